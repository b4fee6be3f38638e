"""Who hands labelled scans to `dataset`: LIDC-IDRI, folders of pairs, phantoms."""
