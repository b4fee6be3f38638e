"""lungseg: 3D lung-nodule segmentation in CT, trained on a cluster or on a laptop."""

__version__ = "0.1.0"
