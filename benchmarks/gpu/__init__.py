"""The parts of `python -m benchmarks.gpu_day`.

| module | content |
|---|---|
| `sizes` | shapes, rows and rounds, for a GPU and for a dry run |
| `clock` | timing of calls: CUDA graphs in turns, or a stand-in on the CPU |
| `bench` | the device, its clock and the sizes, which all measurements share |
| `inputs` | activations with outliers, and copies of weights that do not fit into the L2 cache |
| `bars` | bars for the speed |
| `day` | stages and cases, the result file, time limits |
| `supervisor` | restarts the measuring process when a kernel hangs or breaks the GPU, and copies results |
| `facts` | the machine, the commit, and texts without paths |
| `standin` | a GPU that compiles and runs nothing, for `bundle` and tests |
| `bundle`, `kernels` | kernels compiled beforehand: made, and unpacked on the day |
| `checks` | GPU tests, correctness gates, and failed cases again under compute-sanitizer |
| `ceilings`, `linear`, `decode`, `parts`, `candidates`, `profile`, `exported`, `peers` | the measurements |
| `predictions` | predictions of `benchmarks.predicted` beside measurements |
| `llama` | the model that `decode` runs |
| `summary` | the final table and the plots |
"""
