"""One CT in patient millimetres: from DICOM, NIfTI or NRRD to a volume in HU, its grid and its lungs."""
