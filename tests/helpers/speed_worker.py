"""Stands for `int8compile.app.variants` in tests: answers without a model.

`speed_worker.py ANSWER OUTPUTS SECONDS JOB`: the answer at its start, a file with its outputs, and the seconds that it
reports for its turns, in order. After the last one the process ends.
"""

import json
import shutil
import sys


def main() -> None:
    answer, outputs, seconds, job = sys.argv[1:]
    shutil.copyfile(outputs, json.loads(job)["outputs"])
    print("a line that is no answer")
    print(answer, flush=True)
    for each, _ in zip(json.loads(seconds), sys.stdin, strict=False):
        print(json.dumps({"seconds": each, "cpu": 0.0}), flush=True)


main()
