"""`ray job submit -- python jobs/train.py …`: the verb `lungseg train` inside a cluster's job.

Settings and credentials come from the job's environment (LUNGSEG_STORE, AWS_*).
"""

import sys

from lungseg.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
