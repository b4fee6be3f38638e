"""Synthetic chest CT with the nodules that LIDC's readers drew."""
