"""`ray job submit -- python jobs/fit-post.py …`: the verb `lungseg fit-post` inside a cluster's job.

Settings and credentials come from the job's environment (LUNGSEG_STORE, AWS_*).
"""

import sys

from lungseg.cli import main

if __name__ == "__main__":
    main(["fit-post", *sys.argv[1:]])
