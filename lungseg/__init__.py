"""lungseg: 3D lung-nodule segmentation in CT, trained on a cluster or on a laptop."""

import os

__version__ = "0.1.0"

# TensorFlow itself takes oneDNN's convolutions only on CPUs with AVX-512 VNNI or newer; with AVX2 a step of
# a 3D U-Net is several times faster with them too. Read once, when TensorFlow is first imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Unless told otherwise, TensorFlow plans the gradient of each kernel anew in each step, for want of memory.
os.environ.setdefault("TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE", "0")
