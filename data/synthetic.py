"""Drawn faces in the FaceSynthetics layout: OUT/000000.png (RGB) beside OUT/000000_seg.png (8-bit index mask).

A head is points in its own coordinates: x to image-right, y down, z to the viewer, chin at y = 1, top of the skull at
y = -1. One projection brings them to the picture and one four-channel canvas (red, green, blue, label) takes the paint,
so image and mask cannot disagree. Left_* is the side of the upright face at image-left; it turns with the face.

    python -m data.synthetic --out faces --count 600 --size 192 --seed 0
"""

import argparse
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path

import cv2
import numpy as np

from data import DataError

IGNORE = 255
OVERSAMPLING = 3  # odd: a pixel of the mask is the very centre of the block that its image pixel averages
Face = IntEnum("Face", "BACKGROUND SKIN NOSE RIGHT_EYE LEFT_EYE RIGHT_BROW LEFT_BROW RIGHT_EAR LEFT_EAR MOUTH_INTERIOR "
               "TOP_LIP BOTTOM_LIP NECK HAIR BEARD CLOTHING GLASSES HEADWEAR FACEWEAR", start=0)  # ids of face19.yaml
SIDES = ((-1, Face.LEFT_EYE, Face.LEFT_BROW, Face.LEFT_EAR), (1, Face.RIGHT_EYE, Face.RIGHT_BROW, Face.RIGHT_EAR))
MIRRORED = np.array([0, 1, 2, 4, 3, 6, 5, 8, 7, *range(9, 19)], np.uint8)  # label -> its label in the mirrored picture
SKINS = np.array([(250, 218, 195), (236, 190, 160), (214, 160, 122), (178, 122, 86), (126, 80, 56), (92, 62, 48)])
HAIRS = np.array([(26, 22, 22), (52, 36, 28), (92, 60, 38), (140, 70, 36), (206, 168, 104), (150, 148, 146)])
IRISES = np.array([(70, 44, 26), (46, 30, 22), (76, 104, 132), (84, 104, 66)])
SHADES = np.array([(-0.32, -0.02, 0.6, 0.2, 0.16), (0.32, -0.02, 0.6, 0.2, 0.16), (0, 0.53, 0.75, 0.12, 0.16),
                   (0, 0.88, 0.65, 0.13, 0.12), (0, 1.15, 0.1, 0.35, 0.3)])  # soft shades: x, y, z, width, depth
PARTING = np.array([0, 0.59, 0.81])  # normal of the slanted plane that parts the face from the hair
SPAN = np.linspace(-1, 1, 15)
ARCH = np.sqrt(1 - SPAN**2)
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 29)), np.sin(np.linspace(0, 2 * np.pi, 29))], axis=1)
SPHERE = (cloud := np.random.default_rng(0).normal(size=(400, 3))) / np.linalg.norm(cloud, axis=1, keepdims=True)
Pose = namedtuple("Pose", "yaw pitch roll x y unit")  # radians to image-right, down, clockwise; shares of the side


class Head:
    """One person on a canvas uint8 (side, side, 4). No draw from `rng` may depend on the pose."""

    def __init__(self, rng: np.random.Generator, pose: Pose, size: int) -> None:
        unlabelled = np.pad(_background(rng, size), ((0, 0), (0, 0), (0, 1)))
        self.rng, self.pose, self.canvas = rng, pose, cv2.resize(unlabelled, None, fx=OVERSAMPLING, fy=OVERSAMPLING)
        tone, share = divmod(rng.uniform(0, len(SKINS) - 1.01), 1)
        self.skin = SKINS[int(tone)] * (1 - share) + SKINS[int(tone) + 1] * share + rng.normal(0, 6, 3)
        self.hair = HAIRS[rng.integers(len(HAIRS))] * rng.uniform(0.8, 1.3) + rng.normal(0, 5, 3)
        self.style, (width, length) = rng.choice(["bald", "short", "long"], p=[0.1, 0.6, 0.3]), rng.uniform(0.9, 1.1, 2)
        self.skull = SPHERE * (0.7 * width, 0.8, 0.85) + (0, -0.2, -0.15)
        self.jaw = SPHERE * (0.58 * width, 0.58 * length, 0.58) + (0, 0.42, 0.12)
        self.viewer = np.array([-np.sin(pose.yaw), -np.tan(pose.pitch), np.cos(pose.yaw)])  # the way to the viewer

    def project(self, points: np.ndarray) -> np.ndarray:
        """Head coordinates (N, 3) to shares of the picture's side (N, 2)."""
        p, (x, y, z) = self.pose, np.asarray(points, float).T
        x, z = x * np.cos(p.yaw) + z * np.sin(p.yaw), z * np.cos(p.yaw) - x * np.sin(p.yaw)
        y = y * np.cos(p.pitch) + z * np.sin(p.pitch)
        x, y = x * np.cos(p.roll) - y * np.sin(p.roll), x * np.sin(p.roll) + y * np.cos(p.roll)
        return np.stack([x, y], axis=1) * p.unit + (p.x, p.y)

    def on(self, x: np.ndarray, y: np.ndarray, lift: np.ndarray = 0.0) -> np.ndarray:
        """The points (N, 3) of the face's front surface at x, y, raised by `lift`."""
        x, y, lift = np.broadcast_arrays(np.asarray(x, float), y, lift)
        skull = 0.85 * np.sqrt(np.maximum(0, 1 - (x / 0.7) ** 2 - ((y + 0.2) / 0.8) ** 2)) - 0.15
        jaw = 0.58 * np.sqrt(np.maximum(0, 1 - (x / 0.58) ** 2 - ((y - 0.42) / 0.58) ** 2)) + 0.12
        return np.stack([x, y, np.maximum(skull, jaw) + lift], axis=1)

    def fill(self, points: np.ndarray, colour: np.ndarray, label: Face, width: float = 0) -> None:
        """Paint a polygon or, with a `width` in head units, a line through points (N, 3), or (N, 2) in the picture."""
        points, paint = np.asarray(points), (*np.clip(colour, 0, 255).tolist(), label)
        pixels = np.rint((self.project(points) if points.shape[1] == 3 else points) * len(self.canvas)).astype(np.int32)
        if width:
            cv2.polylines(self.canvas, [pixels], False, paint, int(np.ceil(width * self.pose.unit * len(self.canvas))))
        else:
            cv2.fillPoly(self.canvas, [pixels], paint)

    def hull(self, points: np.ndarray, colour: np.ndarray, label: Face) -> None:
        self.fill(cv2.convexHull(np.float32(self.project(points)))[:, 0], colour, label)

    def band(self, x: np.ndarray, top: np.ndarray, end: np.ndarray, colour: np.ndarray, label: Face, lift: float = 0):
        """Paint the face's surface between two curves over x."""
        self.fill(np.concatenate([self.on(x, top, lift), self.on(x, end, lift)[::-1]]), colour, label)

    def body(self) -> None:
        """Shoulders, which stay upright below a tilted head, long hair on them, and the neck."""
        rng, (wide, drop, girth, low) = self.rng, self.rng.uniform((1.5, 0.36, 0.36, 0.5), (2, 0.5, 0.46, 0.68))
        right = np.array([(0.3, drop - 0.14), (0.5, drop), (wide * 0.8, drop + 0.4), (wide, drop + 0.75), (wide, 9)])
        collar = np.array([(-girth * 1.1, 0.3), (-0.25, low), (0.25, low), (girth * 1.1, 0.3)])
        throat, *jaw = self.project([(0, 0.85, -0.2), (girth, 0.45, -0.15), (-girth, 0.45, -0.15)])
        shoulders = np.concatenate([right, right[::-1] * (-1, 1)])
        self.fill(shoulders * self.pose.unit + throat, rng.uniform(5, 210, 3), Face.CLOTHING)
        if self.style == "long":
            ends = [(side * k, rng.uniform(0.5, 1.5), z) for side in (-1, 1) for k in (0.5, 0.9) for z in (-0.6, -0.1)]
            self.hull(np.concatenate([self.skull * 1.1, ends]), self.hair * 0.8, Face.HAIR)
        self.fill([*jaw, *(collar * self.pose.unit + throat)], self.skin * 0.86, Face.NECK)

    def ears(self, sides: list[tuple]) -> None:
        for side, _, _, label in sides:
            for x, y, colour in ((*CIRCLE.T, self.skin * 0.94), (*CIRCLE.T * 0.6, self.skin * 0.72)):
                flap = np.stack([side * (0.79 + 0.13 * x), 0.12 + 0.3 * y, -0.14 - 0.2 * x], axis=1)
                self.fill(flap, colour + (6, 0, 0), label)

    def face(self) -> None:
        """From back to front: ears, hair, face, the near ear of a turned head, locks over the ears."""
        rng, hairline = self.rng, -9 if self.style == "bald" else self.rng.uniform(-0.14, 0.05)
        self.ears(list(SIDES))
        if self.style != "bald":
            hair = self.skull * rng.uniform(1.04, 1.22) * rng.normal(1, rng.uniform(0.002, 0.03), (400, 1))
            self.hull(hair[hair @ PARTING < hairline + 0.1], self.hair, Face.HAIR)
        self.hull(np.concatenate([self.skull[self.skull @ PARTING > hairline], self.jaw]), self.skin, Face.SKIN)
        self.ears([side for side in SIDES if side[0] * self.viewer[0] > 0.12])
        if self.style == "long":
            end, z = rng.uniform((0.5, 0), (1, 0.3))
            for side in (-0.65, 0.65):
                lock = (1.3, -0.1, -0.3), (1.2, end, -0.3), (1, end, 0.1), (0.95, 0.1, z), (0.7, -0.75, 0.3)
                self.hull(np.multiply(lock, (side, 1, 1)), self.hair * 0.92, Face.HAIR)

    def beard_and_mouth(self) -> None:
        rng, rough, (kind, blend) = self.rng, self.rng.normal(0, 0.02, len(SPAN)), self.rng.uniform(0, (1, 0.3))
        colour = self.hair * 0.8 * (1 - blend) + self.skin * blend
        if kind < 0.15:  # full, from ear to ear
            self.band(SPAN * 0.57, 0.52 - 0.4 * np.abs(SPAN) ** 3 + rough, 1.08 - 0.7 * SPAN**4, colour, Face.BEARD)
        elif kind < 0.27:  # goatee
            self.band(SPAN * 0.38, 0.52 + 0.06 * SPAN**2 + rough, 1.06 - 0.2 * SPAN**2, colour, Face.BEARD)
        if kind < 0.34:  # moustache
            self.band(SPAN * 0.37, 0.5 + 0.1 * SPAN**2 + rough / 2, 0.6 + 0.14 * SPAN**2, colour, Face.BEARD, 0.02)
        colour = self.skin * (0.86, 0.62, 0.6) + (18, 0, 4) + rng.normal(0, (10, 5, 5))
        wide, open_, teeth, top, end = rng.uniform((0.24, 0.08, -0.06, 0.07, 0.09), (0.36, 0.3, 0.1, 0.11, 0.14))
        x, gape, centre = SPAN * wide, open_ * ARCH * (rng.random() < 0.62), 0.63 - rng.normal(0.02, 0.04) * SPAN**2
        upper, lower = centre - gape * 0.35, centre + gape * 0.65
        self.band(x, upper, lower, (70, 20, 24), Face.MOUTH_INTERIOR, 0.02)
        self.band(x, upper, np.clip(upper + teeth * ARCH, upper, lower), (226, 220, 206), Face.MOUTH_INTERIOR, 0.02)
        self.band(x, upper - top * ARCH * (1 - 0.3 * np.exp(-25 * SPAN**2)), upper, colour * 0.88, Face.TOP_LIP, 0.02)
        self.band(x, lower, lower + end * ARCH, colour, Face.BOTTOM_LIP, 0.02)

    def eyes(self) -> None:
        """Brows, lashes, and eyeballs with iris and pupil between the lids."""
        rng, along, slant = self.rng, (SPAN + 1) / 2, self.rng.normal(0, 0.02) * SPAN
        apart, wide, tall, gaze = rng.uniform((0.3, 0.17, 0.075, -0.06), (0.34, 0.2, 0.11, 0.06))
        brow = rng.normal(-0.2, 0.03) + rng.normal(0, 0.05) * SPAN - rng.uniform(0.02, 0.1) * np.sin(np.pi * along)
        half, hair = rng.uniform(0.05, 0.075) * (1.1 - 0.7 * along**2), self.hair * 0.7 + self.skin * 0.05
        upper, lower, shut = 0.02 + slant - tall * ARCH, 0.02 + slant + 0.75 * tall * ARCH, rng.random() < 0.05
        iris = IRISES[rng.integers(len(IRISES))] + rng.normal(0, 8, 3)
        for side, eye, label, _ in SIDES:
            self.band(side * (0.13 + 0.44 * along), brow - half, brow + half, hair, label, 0.01)
            x = side * (apart + SPAN * wide)
            self.fill(self.on(x, lower if shut else upper - 0.015), self.skin * 0.35, Face.SKIN, width=0.05)
            for radius, paint in () if shut else ((1, (232, 226, 220)), (0.1, iris), (0.045, iris * 0.2)):
                ball = np.sqrt(np.maximum(0, radius**2 - (x - side * apart - gaze) ** 2))
                self.band(x, np.maximum(upper, 0.01 - ball), np.minimum(lower, 0.01 + ball), paint, eye)

    def nose(self) -> None:
        wide, y, out = self.rng.uniform((0.15, 0.36, 0.16), (0.21, 0.44, 0.28))
        ridge = self.on([-0.03, 0.03, 0.07, 0, -0.07], [0, 0, y - 0.06, y + 0.06, y - 0.06], [0.05, 0.05, *[out] * 3])
        sides = self.on([-0.08, 0.08, -wide, wide, -wide, wide], [0, 0, y - 0.05, y - 0.05, y + 0.03, y + 0.03], 0.05)
        self.hull(np.concatenate([ridge, sides]), self.skin * 0.93, Face.NOSE)
        self.fill(ridge, self.skin * 1.05 + 4, Face.NOSE)
        for x in (-wide / 2, wide / 2):
            self.fill(self.on([x - 0.02, x + 0.02], y + 0.03, out * 0.6), self.skin * 0.4, Face.NOSE, width=0.05)

    def fringe(self) -> None:
        """The hair's edge over the forehead, and now and then locks that fall over brow and eye."""
        rng, thick = self.rng, self.rng.choice([0.05, 0.1, 0.25, 0.4], p=[0.3, 0.3, 0.28, 0.12])
        edge = -0.72 + thick * np.minimum(1, 0.5 + np.abs(SPAN - rng.uniform(-0.6, 0.6))) + 0.12 * SPAN**2
        edge += rng.normal(0, 0.05, len(SPAN)) * (0.4 + thick)
        if self.style != "bald":
            self.band(SPAN * 0.6, SPAN * 0 - 0.82, edge, self.hair * 0.95, Face.HAIR, 0.05)
            for x, slide in rng.uniform(-0.45, 0.45, (3 * (rng.random() < 0.15), 2)):
                self.fill(self.on([x, x + slide], [-0.7, slide], 0.05), self.hair * 1.1, Face.HAIR, width=0.05)

    def glasses_and_mask(self) -> None:
        rng, (wide, tall, thick, corner) = self.rng, self.rng.uniform((0.24, 0.19, 0.04, 0.5), (0.28, 0.26, 0.08, 1))
        worn, dark, colour = *(rng.random(2) < (0.27, 0.25)), rng.uniform(20, 220, 3) * rng.choice([0.15, 1])
        x, y = (np.sign(CIRCLE) * np.abs(CIRCLE) ** corner * (wide, tall)).T
        for side in (-1, 1) if worn else ():
            rim = np.stack([side * (x + 0.32), y + 0.05, 0.75 - 0.15 * (x + wide)], axis=1)
            if dark:
                self.fill(rim, colour * 0.35, Face.GLASSES)
            arm = [(side * 0.72, 0, -0.1)] if side * self.viewer[0] > -0.1 else []  # the head hides the far one
            self.fill([*arm, *rim[:15], (0, 0.02, 0.75), *rim[14:]], colour, Face.GLASSES, width=thick)
        x, y = rng.uniform((0.45, 0.2), (0.55, 0.3))
        if rng.random() < 0.06:
            cloth = self.on([-x, x, -0.4, 0.4, -0.2, 0.2, 0], [y, y, 0.85, 0.85, 1, 1, y], [0, 0, 0, 0, 0, 0, 0.3])
            self.hull(cloth, rng.uniform(60, 250, 3), Face.FACEWEAR)

    def headwear(self) -> None:
        """Headphones, a woollen hat, a cap with a peak or a hat with a brim."""
        rng, colour = self.rng, self.rng.uniform(20, 235, 3)
        kind, low, grow = rng.uniform((0, -0.6, 1.16), (1, -0.45, 1.26))
        if kind < 0.07:
            band = np.stack([0.82 * SPAN, 0.1 - 1.25 * ARCH, 0 * SPAN - 0.15], axis=1)
            band = band[(band[:, 1] < 0) | (band[:, 0] * self.viewer[0] > -0.15)]  # the head hides the far end
            self.fill(band, colour, Face.HEADWEAR, width=0.14)
            for end in band[band[:, 1] > 0]:
                self.fill([end - (0, 0.15, 0), end + (0, 0.2, 0)], colour * 0.8, Face.HEADWEAR, width=0.25)
        elif kind < 0.28:
            crown = self.skull[self.skull[:, 1] < low + 0.35 * (self.skull[:, 2] < -0.2)]
            brim = np.insert(CIRCLE * (1.25 if kind > 0.21 else 0.62, 1.25), 1, low + 0.12 * CIRCLE[:, 1], axis=1)
            self.hull(crown[crown @ self.viewer > -0.3] * grow, colour, Face.HEADWEAR)  # not what the head hides
            if kind > 0.14:
                self.hull(brim[brim @ self.viewer > 0], colour * 0.78, Face.HEADWEAR)

    def occluder(self) -> None:
        """A thing or a hand in front of the face; it belongs to the background."""
        rng, (x, y, angle, wide) = self.rng, self.rng.uniform((-0.7, -0.1, 0, 0.09), (0.7, 1, np.pi, 0.15))
        colour = self.skin if rng.random() < 0.5 else rng.uniform(0, 255, 3)
        along, across = np.array([(np.cos(angle), np.sin(angle), 0), (-np.sin(angle), np.cos(angle), 0)])
        for finger in (-1.5, -0.5, 0.5, 1.5) if rng.random() < 0.08 else ():
            tip = (x, y, 0.9) + across * wide * finger + along * finger**2 * 0.1
            self.fill([tip, tip + along * 4], colour * (1 + 0.04 * finger), Face.BACKGROUND, width=wide * 1.2)

    def light(self, mask: np.ndarray) -> np.ndarray:
        """Gain (size, size): strands, cloth and pores, a lamp on the ellipsoid of the head, soft shades of the skin."""
        rng, size, p = self.rng, len(mask), self.pose
        y, x = (np.mgrid[:size, :size].astype(np.float32) / size - np.float32([[[p.y]], [[p.x]]])) / np.float32(p.unit)
        crown, *spots = np.float32((self.project([(0, -1, -0.3), *SHADES[:, :3]]) - (p.x, p.y)) / p.unit)
        angle = np.arctan2(y - crown[1], x - crown[0]) * (90 / np.pi) + 90
        strands = np.float32(rng.normal(0, rng.uniform(0.04, 0.14), 181))[angle.astype(int)]
        stripes = rng.choice([0, 0, 0.2]) * np.sign(np.sin((y * rng.uniform(-1, 1) + x) * rng.uniform(10, 50)))
        gain = 1 + cv2.resize(rng.standard_normal((size // 2, size // 2), np.float32), (size, size)) * 0.04
        gain += np.select([mask == Face.CLOTHING, (mask == Face.HAIR) | (mask == Face.BEARD)], [stripes, strands])
        lamp, strength = rng.normal((0, -0.5, 1.2), 1), rng.uniform(0.2, 0.55)
        normal = np.stack([x / 0.85, y / 1.15, np.sqrt(np.maximum(0.05, 1 - (x / 0.85) ** 2 - (y / 1.15) ** 2))])
        facing = np.tensordot(np.float32(lamp / np.linalg.norm(lamp)), normal, 1) / np.sqrt((normal**2).sum(0))
        shade = sum(depth * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / width**2)
                    for spot, (width, depth) in zip(spots, SHADES[:, 3:].tolist(), strict=True))
        gain *= (1 + strength * (facing - 0.6)) * (1 - shade * ((mask <= Face.NOSE) | (mask == Face.NECK)))
        return np.where(mask == Face.BACKGROUND, 1, np.maximum(gain, 0.35)).astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A blurred clutter, skin and hair colours among it, uint8 (size, size, 3)."""
    cells, grey = rng.integers(2, 9), rng.uniform(20, 235, (7, 1))
    palette = np.concatenate([SKINS[::2], HAIRS[::2], grey[1:] + rng.normal(0, 30, (6, 3))]).clip(0, 255)
    haze = grey[0] + rng.normal(0, 25, 3) + rng.normal(0, 25, (cells, cells, 1)) + rng.normal(0, 9, (cells, cells, 3))
    scene = cv2.resize(np.clip(haze, 0, 255).astype(np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
    for colour in palette[rng.integers(len(palette), size=rng.integers(0, 12))]:
        corners = rng.uniform(0, size, 2) + rng.normal(0, size * rng.uniform(0.03, 0.3), (rng.integers(3, 7), 2))
        cv2.fillPoly(scene, [cv2.convexHull(corners.astype(np.int32))], colour.tolist())
    return cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.3, 4) * size / 192)


def draw_person(rng: np.random.Generator, pose: Pose, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What `draw_face` returns, in any pose, without mirror and specks; one state of `rng` is one person."""
    head = Head(rng, pose, size)
    for part in (head.body, head.face, head.beard_and_mouth, head.eyes, head.nose,
                 head.fringe, head.glasses_and_mask, head.headwear, head.occluder):
        part()
    mask = np.ascontiguousarray(head.canvas[1::OVERSAMPLING, 1::OVERSAMPLING, 3])
    image = cv2.resize(head.canvas, (size, size), interpolation=cv2.INTER_AREA)[..., :3] * head.light(mask)[..., None]
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 0.8) * size / 192)
    contrast, gain = rng.uniform(0.8, 1.15), np.float32(rng.uniform(0.75, 1.2) * rng.normal(1, 0.05, 3))
    image = ((image - 110) * contrast + 110) * gain + rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 5)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def draw_face(seed: int, index: int, size: int = 192) -> tuple[np.ndarray, np.ndarray]:
    """Picture `index` of the set `seed`, a pure function of the arguments: an RGB image (size, size, 3) and its labels
    (size, size), both uint8. Labels are 0..18 of face19, or 255 in a few ignored specks."""
    rng = np.random.default_rng((seed, index))
    yaw, pitch, roll = np.clip(rng.normal(0, (0.32, 0.12, 0.18)), (-0.85, -0.3, -0.61), (0.85, 0.3, 0.61))
    pose = Pose(yaw, pitch, roll, x=rng.normal(0.5, 0.02), y=rng.normal(0.45, 0.02), unit=rng.uniform(0.34, 0.4))
    image, mask = draw_person(rng, pose, size)
    if rng.random() < 0.5:  # whatever is drawn above, a picture and its mirror image are equally likely
        image, mask = np.ascontiguousarray(image[:, ::-1]), MIRRORED[mask[:, ::-1]]
    for x, y, wide, high in rng.integers((0, 0, 1, 1), (size, size, 3, 3), (max(0, rng.integers(-2, 6)), 4)):
        mask[y : y + high, x : x + wide] = IGNORE
    return image, mask


def write_dataset(root: Path, count: int, seed: int = 0, size: int = 192, workers: int | None = None) -> None:
    """Write `count` pictures and masks under `root`, over those of the same name; same arguments, same bytes.
    Raises DataError if `count` is below 1, `size` below 32 pixels, or `root` cannot be written."""
    if count < 1 or size < 32:
        raise DataError(f"{root}: --count {count}, --size {size}: ask for 1 picture or more, of 32 pixels or more")

    def write(index: int) -> None:
        image, mask = draw_face(seed, index, size)
        cv2.imencode(".png", image[..., ::-1])[1].tofile(root / f"{index:06d}.png")
        cv2.imencode(".png", mask)[1].tofile(root / f"{index:06d}_seg.png")

    try:
        root.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(write, range(count)))
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error}); choose another --out") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a face data set in the FaceSynthetics layout.")
    parser.add_argument("--out", dest="root", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=600, help="number of pictures")
    parser.add_argument("--size", type=int, default=192, help="side of the square pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="which set: another seed for another split")
    try:
        write_dataset(**vars(parser.parse_args()))
    except DataError as error:
        parser.error(str(error))
