"""Jobs on a cluster, from a laptop."""
