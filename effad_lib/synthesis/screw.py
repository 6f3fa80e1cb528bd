"""The product `screw`: a countersunk, zinc-plated wood screw that lies on a light table, turned to any side."""

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.products import product
from effad_lib.synthesis.scene import Array, Canvas, Item, Pose, Scene, cloud, colour, grain, mix, smoothstep

LENGTH, HEAD, TILT = 1.56, 0.235, 0.24  # from face to tip; radius of the head; sine of the slope at which it lies

# Along the axis from the face: radius of the body, and how far the thread stands out of it.
BODY = ((-0.1, 0.0, 0.022, 0.10, 0.17, 0.24, 0.32, 0.74, 0.77, 1.36, 1.47, 1.555, 1.56, 1.8),
        (HEAD, HEAD, HEAD, 0.165, 0.117, 0.096, 0.090, 0.089, 0.072, 0.064, 0.042, 0.006, 0.0, 0.0))  # fmt: skip
THREAD = ((0.73, 0.80, 1.33, 1.50, 1.535), (0.0, 0.042, 0.040, 0.012, 0.0))
STEP = 1 / 400


@product("screw")
def screw(canvas: Canvas, rng: Generator) -> Item:
    """Countersunk wood screw, smooth shank and coarse thread, held up at one end by the rim of its head."""
    x, y = rng.normal(0, 0.012, 2)
    pose = Pose(float(x), float(y), float(rng.uniform(0, 2 * np.pi)), float(rng.normal(1, 0.006)))
    shape = _Shape(canvas, rng)

    table = colour(0.775, 0.775, 0.770) * rng.normal(1, 0.010) + 0.008 * cloud(rng, canvas, 0.7, 3)
    table = table + 0.006 * grain(rng, canvas, 0.9, 0.9)
    drawn = grain(rng, canvas, 0.05 * min(canvas.shape), 0.7, pose.angle)
    patina = 1 + 0.05 * cloud(rng, canvas, 0.10, 3) + 0.05 * drawn
    zinc = colour(1.0, 1.0, 1.015) * float(rng.normal(1, 0.025))

    u, v = pose.local(canvas.x, canvas.y)
    reach = np.where(u < 0.35 - LENGTH / 2, HEAD + 0.04, 0.15)
    near = np.flatnonzero((np.abs(u) < LENGTH / 2 + 0.12) & (np.abs(v) < reach))
    tone, cover, height = (np.zeros(canvas.shape, np.float32) for _ in range(3))
    tone.flat[near], cover.flat[near], height.flat[near] = shape.paint(u.flat[near], v.flat[near], pose)

    albedo = mix(table * (1 - 0.5 * shape.shadow(pose)), tone * patina * zinc, cover)
    scene = Scene(albedo, (height + 0.06 * drawn) * cover, 0.06 * cover, cover, colour(0.88, 0.87, 0.85))
    return Item(canvas, lambda parts: scene, pose=pose)


class _Shape:
    """One screw with its tolerances, in its own coordinates: s along the axis from the face, v across."""

    def __init__(self, canvas: Canvas, rng: Generator) -> None:
        self.canvas = canvas
        long, thick = rng.normal(1, (0.006, 0.012))
        s = np.arange(-0.1, 1.8, STEP)
        bodies = [ndimage.gaussian_filter1d(np.interp(s / long, *nodes), 0.008 / STEP) for nodes in (BODY, THREAD)]
        self.body, self.fin = (np.float32(thick) * radius.astype(np.float32) for radius in bodies)
        self.slope = np.gradient(self.body, np.float32(STEP))
        # Below five pixels a turn the thread would alias, so small images show fewer turns.
        self.pitch = max(0.102, 5 * canvas.pixel) * float(rng.normal(1, 0.006))
        self.edge = max(0.017, 0.7 * canvas.pixel)
        self.phase, self.turn = float(rng.normal(0, 0.06)), float(rng.uniform(0, np.pi / 2))
        self.tilt = float(TILT * rng.normal(1, 0.04))

    def paint(self, u: Array, v: Array, pose: Pose) -> tuple[Array, Array, Array]:
        """Tone, cover and height of the pixels at (u, v), each the mean of many points within the pixel."""
        count = 2 if self.canvas.pixel < 0.012 else 4
        steps = (np.arange(count, dtype=np.float32) - (count - 1) / 2) * np.float32(self.canvas.pixel / count)
        du, dv = (a.reshape(-1, 1) for a in np.meshgrid(steps, steps))
        tone, inside, height = self._points(u + du + LENGTH / 2, v + dv, pose)
        cover = inside.mean(axis=0)
        return (tone * inside).mean(axis=0) / np.maximum(cover, 1e-3), cover, height.mean(axis=0) / self.canvas.pixel

    def _points(self, s: Array, v: Array, pose: Pose) -> tuple[Array, Array, Array]:
        """Tone, inside (0 or 1) and height of points on the screw."""
        face = HEAD**2 - v**2 - (s / self.tilt) ** 2 > 0
        # The head leans towards the camera: what stands higher is seen farther from it.
        at = self._index(s)
        for _ in range(2):
            at = self._index(s - self.tilt * np.sqrt(np.maximum(self.body[at] ** 2 - v**2, 0)))
        radius, fin, slope = self.body[at], self.fin[at], self.slope[at]
        around = np.arccos(np.clip(v / (radius + fin + 1e-4), -1, 1))
        lift = self.tilt * np.sqrt(np.maximum((radius + fin) ** 2 - v**2, 0))
        turns = (s - lift) / self.pitch - around / (2 * np.pi) - self.phase
        off = (turns - np.rint(turns)) * (self.pitch / self.edge)
        ridge = np.exp(-(off**2)) * fin
        slope = slope - 2 * off * ridge / self.edge
        radius = radius + ridge
        inside = face | ((np.abs(v) < radius) & (s > 0))

        t = np.clip(v / np.maximum(radius, 1e-3), -1, 1)
        up = np.sqrt(1 - t * t)
        size = np.sqrt(1 + slope * slope)
        tone = _reflect(-slope / size, t / size, up / size, pose.angle)
        # Between two turns of the thread less light gets in.
        tone = tone * (1 - 0.30 * smoothstep(fin / 0.03) * (1 - ridge / np.maximum(fin, 1e-3)))
        height = 0.2 * radius * up * up
        if face.any():
            tone[face], height[face] = self._face(s[face] / self.tilt, v[face], pose)
        return tone, inside.astype(np.float32), height.astype(np.float32)

    def _index(self, s: Array) -> Array:
        return np.clip((s + 0.1) * (1 / STEP), 0, len(self.body) - 1).astype(np.int32)

    def _face(self, a: Array, b: Array, pose: Pose) -> tuple[Array, Array]:
        """Tone and height of the face, seen from above: a chamfered rim around a cross recess."""
        c, s = float(np.cos(self.turn)), float(np.sin(self.turn))
        p, q = np.abs(c * a + s * b), np.abs(c * b - s * a)
        arm = np.minimum(np.maximum(p / 0.125, q / 0.034), np.maximum(q / 0.125, p / 0.034))
        recess = smoothstep((1.1 - np.minimum(arm, np.hypot(a, b) / 0.062)) / 0.25)
        rim = smoothstep((np.hypot(a, b) / HEAD - 0.88) / 0.06)
        flat = _reflect(np.float32(-0.75), np.float32(0), np.float32(0.66), pose.angle)
        return flat * (1 + 0.20 * rim) * (1 - 0.62 * recess), 0.03 - 0.03 * recess

    def shadow(self, pose: Pose) -> Array:
        """Soft shadow [H, W], sharp where the screw touches the table and wide where it is held up."""
        u, v = pose.local(self.canvas.x - 0.028, self.canvas.y - 0.028)
        s = u + LENGTH / 2
        lift = np.clip(1.15 - s / LENGTH, 0.15, 1)
        distance = np.maximum(np.abs(v) - (self.body + self.fin * 0.6)[self._index(s)], np.maximum(-s, s - LENGTH))
        near, wide = (smoothstep(0.5 - distance / (reach * lift)) for reach in (0.12, 0.5))
        return 0.7 * near + 0.3 * wide


def _reflect(a: Array, b: Array, up: Array, angle: float) -> Array:
    """Brightness of drawn zinc for a normal (a, b, up), a and b in the screw's own frame, which lies at `angle`."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    lamp_a, lamp_b = -0.30 * (c + s), -0.30 * (c - s)
    # Fine drawing marks along the axis pull the lamp's image out along it.
    lamp = np.exp(-(((a - lamp_a) / 0.55) ** 2) - ((b - lamp_b) / 0.16) ** 2)
    sky = 0.27 + 0.22 * up * up + 0.12 * (a * lamp_a + b * lamp_b) / 0.42
    return sky + 0.38 * lamp + 0.10 * np.exp(-((np.abs(b) - 0.86) ** 2) / 0.006)
