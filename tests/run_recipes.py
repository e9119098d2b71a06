"""python -m tests.run_recipes JOBS.json: trains experiments one after another.

JOBS.json is {name: [config, override, ...]}. For each prints a line of JSON, [name, exit code, what it printed].
"""

import json
import sys
from pathlib import Path

from tests.forks import attempt

if __name__ == "__main__":
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        print(json.dumps([name, *attempt(job)]), flush=True)
