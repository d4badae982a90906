"""What `python -m benchmarks.gpu_day` is made of.

| module | holds |
|---|---|
| `sizes` | what is measured: shapes, rows, rounds; for a GPU and for a dry run |
| `clock` | how a call is timed: CUDA graphs in turns, or a stand-in on the CPU |
| `inputs` | activations with outliers, and copies of weights that do not fit into the L2 cache |
| `bars` | how fast is fast enough |
| `day` | stages and cases, the result file, time limits |
| `supervisor` | a process that restarts the measuring one when a kernel hangs or breaks the GPU, and copies results |
| `facts` | the machine, the commit, and texts without paths |
| `standin` | a GPU that compiles and runs nothing, for `bundle` and tests |
| `bundle`, `kernels` | kernels compiled beforehand: made, and unpacked on the day |
| `checks` | tier 4, the correctness gates, and what failed again under compute-sanitizer |
| `ceilings`, `linear`, `decode`, `parts`, `candidates`, `profile`, `exported`, `peers` | the measurements |
| `predictions` | what `benchmarks.predicted` says, beside what was measured |
| `llama` | the model that `decode` runs |
| `summary` | the table at the end, and the plots |
"""
