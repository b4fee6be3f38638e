"""The nodules as DICOM Segmentation, one segment each, on the grid of the series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom import Dataset
from pydicom.sr.codedict import Code, codes

from lungseg import __version__
from lungseg.scan.volume import Geometry
from lungseg.segment.predict import Segmentation

ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
NODULE = Code("27925004", "SCT", "Nodule")
LUNG = Code("39607008", "SCT", "Lung")
SERIES_DESCRIPTION = "Lung nodules by lungseg, research use only"
MAKER = "lungseg"


def tracking_id(label: int) -> str:
    return f"nodule {label}"


def series_of(source: Sequence[Dataset], number: int) -> dict[str, Any]:
    """What our objects say of themselves: a new series beside the scan's."""
    scan_number = int(source[0].get("SeriesNumber") or 0)
    return {
        "series_instance_uid": hd.UID(),
        "series_number": (abs(scan_number) % 10**6) * 100 + number,
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": MAKER,
        "software_versions": __version__,
        "device_serial_number": "0",
        "series_description": SERIES_DESCRIPTION,
    }


def nodule_segments(
    segmentation: Segmentation,
    source: Sequence[Dataset],
    tracking: Sequence[str],
    parameters: Mapping[str, str],
) -> hd.seg.Segmentation:
    """Segment n is the nodule of label n, with the tracking UID `tracking[n - 1]`.

    `segment.dicom_segmentation` says whether its frames hold one segment each, which every viewer reads, or
    the labels of all. Where slices lie comes from the labels' own geometry, and nothing is turned over.
    """
    algorithm = hd.AlgorithmIdentificationSequence(
        MAKER, codes.DCM.ArtificialIntelligence, __version__, parameters=dict(parameters)
    )
    descriptions = [
        SegmentDescription(
            segment_number=nodule.label,
            segment_label=tracking_id(nodule.label),
            segmented_property_category=ABNORMAL,
            segmented_property_type=NODULE,
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=uid,
            tracking_id=tracking_id(nodule.label),
            anatomic_regions=[LUNG],
        )
        for nodule, uid in zip(segmentation.nodules, tracking, strict=True)
    ]
    return hd.seg.Segmentation(
        source_images=source,
        pixel_array=_volume(segmentation.labels, segmentation.geometry, source[0].FrameOfReferenceUID),
        segmentation_type=SegmentationTypeValues[segmentation.config.dicom_segmentation.upper()],
        segment_descriptions=descriptions,
        content_label="NODULES",
        content_description=SERIES_DESCRIPTION,
        **series_of(source, 1),
    )


def _volume(labels: np.ndarray, geometry: Geometry, frame_of_reference: str) -> hd.Volume:
    affine = np.eye(4)
    # Columns: what one step of slice, row and column is in the patient.
    affine[:3, :3] = np.array(geometry.direction_lps)[:, ::-1] * geometry.spacing_mm
    affine[:3, 3] = geometry.origin_lps_mm
    return hd.Volume(labels.astype(np.uint16), affine, "PATIENT", frame_of_reference)
