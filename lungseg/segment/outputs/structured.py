"""The nodules' measurements as DICOM Structured Report: TID 1500, in a Comprehensive 3D SR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import highdicom as hd
from highdicom import sr
from pydicom import Dataset
from pydicom.sr.codedict import Code, codes
from pydicom.uid import generate_uid

from lungseg import __version__
from lungseg.segment.outputs.dicomseg import ABNORMAL, LUNG, MAKER, NODULE, series_of, tracking_id
from lungseg.segment.predict import Segmentation
from lungseg.segment.quantify import NoduleMeasurement

MM, MM3, HU = (Code(unit, "UCUM", name) for unit, name in (
    ("mm", "millimeter"), ("mm3", "cubic millimeter"), ("[hnsf'U]", "Hounsfield unit"),
))  # fmt: skip
VOLUME = Code("118565006", "SCT", "Volume")
LONG_AXIS = Code("103339001", "SCT", "Long Axis")
SHORT_AXIS = Code("103340004", "SCT", "Short Axis")
DIAMETER = Code("81827009", "SCT", "Diameter")
ATTENUATION = Code("112031", "DCM", "Attenuation Coefficient")
MEAN = Code("373098007", "SCT", "Mean")
STANDARD_DEVIATION = Code("386136009", "SCT", "Standard Deviation")
ABSENT = Code("2667000", "SCT", "Absent")
SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}
Group = sr.MeasurementsAndQualitativeEvaluations | sr.VolumetricROIMeasurementsAndQualitativeEvaluations
DEVICE_UID = generate_uid(entropy_srcs=[MAKER])


def measurement_report(
    segmentation: Segmentation,
    source: Sequence[Dataset],
    segments: hd.seg.Segmentation | None,
    tracking: Sequence[str],
    parameters: Mapping[str, str],
) -> sr.Comprehensive3DSR:
    """One group of measurements a nodule, which refers to its segment by number and shares its tracking UID.
    Without nodules it says that none were found. A device observed; nobody verified.
    """
    algorithm = sr.AlgorithmIdentification(
        MAKER, __version__, [f"{name}: {value}" for name, value in parameters.items()]
    )
    observer = sr.ObserverContext(
        codes.DCM.Device, sr.DeviceObserverIdentifyingAttributes(DEVICE_UID, MAKER, MAKER, MAKER)
    )
    groups: list[Group] = []
    if segments is None:
        groups.append(_none_found(algorithm))
    else:
        series = sr.SourceSeriesForSegmentation(source[0].SeriesInstanceUID)
        for nodule, uid in zip(segmentation.nodules, tracking, strict=True):
            referenced = sr.ReferencedSegment(
                segments.SOPClassUID, segments.SOPInstanceUID, nodule.label, source_series=series
            )
            groups.append(_group(nodule, uid, referenced, algorithm))
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups,
    )
    return sr.Comprehensive3DSR(
        evidence=[*source, *([segments] if segments is not None else [])],
        content=report,
        is_complete=True,
        **series_of(source, 2),
    )


def _group(
    nodule: NoduleMeasurement,
    uid: str,
    referenced: sr.ReferencedSegment,
    algorithm: sr.AlgorithmIdentification,
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid, tracking_id(nodule.label)),
        referenced_segment=referenced,
        finding_category=ABNORMAL,
        finding_type=NODULE,
        finding_sites=[sr.FindingSite(LUNG, laterality=SIDES.get(nodule.side or ""))],
        algorithm_id=algorithm,
        measurements=list(_measurements(nodule)),
    )


def _measurements(nodule: NoduleMeasurement) -> Iterator[sr.Measurement]:
    for name, value, unit, derivation in (
        (VOLUME, nodule.volume_mm3, MM3, None),
        (LONG_AXIS, nodule.longest_axial_diameter_mm, MM, None),
        (SHORT_AXIS, nodule.perpendicular_axial_diameter_mm, MM, None),
        (DIAMETER, nodule.mean_axial_diameter_mm, MM, MEAN),
        (ATTENUATION, nodule.mean_hu, HU, MEAN),
        (ATTENUATION, nodule.sd_hu, HU, STANDARD_DEVIATION),
    ):
        yield sr.Measurement(name, round(value, 3), unit, derivation=derivation)


def _none_found(algorithm: sr.AlgorithmIdentification) -> sr.MeasurementsAndQualitativeEvaluations:
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(hd.UID(), "nodules"),
        algorithm_id=algorithm,
        finding_sites=[sr.FindingSite(LUNG)],
        qualitative_evaluations=[sr.QualitativeEvaluation(NODULE, ABSENT)],
    )
