"""Rotation, scaling and elastic deformation in one resampling.

An output voxel o reads the input at `centre + A (o - middle) + d(o)`: A turns and scales about the middle
of the output, d is a cubic B-spline of random control points (Rueckert et al., 1999), whose basis is a
partition of unity, so no displacement is larger than the largest of a control point.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

IGNORE = 255


def rotation_and_scale(angles_zyx: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """float32 [3, 3] on (z, y, x): turns by `angles_zyx` (radians) about z, then y, then x, times `scale`
    (above 1 reads from further out, so things get smaller)."""
    (cz, cy, cx), (sz, sy, sx) = tf.unstack(tf.cos(angles_zyx)), tf.unstack(tf.sin(angles_zyx))
    about_z = tf.stack([[1.0, 0.0, 0.0], [0.0, cz, -sz], [0.0, sz, cz]])
    about_y = tf.stack([[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]])
    about_x = tf.stack([[cx, -sx, 0.0], [sx, cx, 0.0], [0.0, 0.0, 1.0]])
    return scale * about_x @ about_y @ about_z


def control_shape(shape_zyx: tuple[int, int, int], spacing: int) -> tuple[int, int, int]:
    """Control points along (z, y, x) that a deformation of that many voxels needs."""
    return tuple(-(-side // spacing) + 3 for side in shape_zyx)  # type: ignore[return-value]


def displacement(control: tf.Tensor, shape_zyx: tuple[int, int, int], spacing: int) -> tf.Tensor:
    """float32 [3, z, y, x] of control points float32 [3, k, l, m] that are `spacing` voxels apart."""
    z, y, x = (tf.constant(_basis(side, spacing)) for side in shape_zyx)
    return tf.einsum("xm,yl,zk,cklm->czyx", x, y, z, control, optimize="optimal")


def _basis(side: int, spacing: int) -> np.ndarray:
    """float32 [side, control points]: each row holds the four cubic B-splines that cover its voxel."""
    matrix = np.zeros((side, -(-side // spacing) + 3), np.float32)
    for voxel in range(side):
        cell, t = voxel // spacing, (voxel % spacing) / spacing
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        matrix[voxel, cell : cell + 4] = np.array(weights) / 6
    return matrix


def coordinates(
    shape_zyx: tuple[int, int, int], matrix: tf.Tensor, centre_zyx: tf.Tensor, shift: tf.Tensor | None
) -> tf.Tensor:
    """float32 [3, z, y, x]: where each output voxel reads the input. `centre_zyx` is what the middle of the
    output reads, `shift` a displacement or None."""
    points = tf.reshape(centre_zyx, [3, 1, 1, 1])
    for axis, side in enumerate(shape_zyx):
        along = np.arange(side, dtype=np.float32) - (side - 1) / 2
        shape = [3, *(side if a == axis else 1 for a in range(3))]
        points = points + tf.reshape(matrix[:, axis, tf.newaxis] * along, shape)
    return points if shift is None else points + shift


def sample_at(image: tf.Tensor, mask: tf.Tensor, points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The image (float32 [z, y, x]) trilinearly and the mask (uint8) from its nearest voxel, at `points`
    (float32 [3, z, y, x]). Beyond the border the image goes on as its last voxel, the mask as 255: what
    lies there is not known."""
    shape = tuple(image.shape)
    strides = (shape[1] * shape[2], shape[2], 1)
    nearest, corner, parts, inside = 0, 0, [], []
    for along, side, stride in zip(tf.unstack(points), shape, strides, strict=True):
        clamped = tf.clip_by_value(along, 0.0, side - 1.0)
        inside.append(tf.abs(along - clamped) < 0.5)
        nearest += stride * tf.cast(clamped + 0.5, tf.int32)
        low = tf.minimum(tf.floor(clamped), side - 2.0)
        parts.append(clamped - low)
        corner += stride * tf.cast(low, tf.int32)
    z, y, x = parts
    known = inside[0] & inside[1] & inside[2]
    labels = tf.where(known, tf.gather(tf.reshape(mask, [-1]), nearest), tf.constant(IGNORE, mask.dtype))
    flat = tf.reshape(image, [-1])
    # Neighbours along x lie side by side: four reads of pairs for eight of one.
    pairs = tf.stack([flat, tf.roll(flat, -1, 0)], -1)

    def line(offset: int) -> tf.Tensor:
        first, second = tf.unstack(tf.gather(pairs, corner + offset), axis=-1)
        return first + x * (second - first)

    def plane(offset: int) -> tf.Tensor:
        first = line(offset)
        return first + y * (line(offset + strides[1]) - first)

    near = plane(0)
    return near + z * (plane(strides[0]) - near), labels
