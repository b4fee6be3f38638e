"""From a model and a scan to a mask and its nodules."""
