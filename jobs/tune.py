"""`ray job submit -- python jobs/tune.py …`: the verb `lungseg tune` inside a cluster's job.

Settings and credentials come from the job's environment (LUNGSEG_STORE, AWS_*).
"""

import sys

from lungseg.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
