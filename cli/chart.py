# SPDX-License-Identifier: Apache-2.0
"""A chart of rates over time as a PNG file: panels one below the other, a stepped line for each series.

Drawn with Pillow, which nothing imports before a chart is wanted (the extra `chart`, part of the image).
Everything is drawn at twice its size and then made smaller: that makes lines and letters smooth.

Called by: cli.commands.prestart.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cli.errors import CliError
from cli.output import rounded
from core.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 1200, 700
SCALE = 2
# Pixels around the panels, and between one and the next.
LEFT, RIGHT, TOP, BOTTOM, BETWEEN = 80, 30, 112, 62, 76
TITLE, TEXT = 22, 15
INK, FAINT, GRID, PAPER = "#222222", "#666666", "#e4e4e4", "#ffffff"
# Told apart by eyes that do not see all colours, too (Okabe and Ito); the first line is the subject.
COLOURS = ("#0072b2", "#e69f00", "#cc79a7")
EVEN = "#444444"
# A line this much higher than the next one leaves the chart, or the others could not be read.
TOWERS = 3.0


class Panel(NamedTuple):
    """Rates a second in steps of `step` seconds from 0, by name; a dashed line at `even`, unless it is 0.

    The title says what the rates are of: it stands where the y axis begins.
    """

    title: str
    step: float
    lines: Mapping[str, Sequence[float]]
    even: float = 0.0


def require_pillow() -> None:
    """Raise CliError where no chart can be drawn."""
    if importlib.util.find_spec("PIL") is None:
        raise CliError(
            "a chart needs the Python package Pillow, which is not installed",
            hint="it is in the image; elsewhere: pip install 'holdfast[chart]'",
        )


def save(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels into a PNG file that everybody may read; CliError when it can not be written."""
    buffer = io.BytesIO()
    draw(title, panels).save(buffer, "PNG", optimize=True)
    try:
        write_atomic(path, buffer.getvalue(), mode=0o644, durable=False)
    except OSError as error:
        raise CliError(
            f"{path} can not be written: {error.strerror}", hint="--chart names another file"
        ) from error


def draw(title: str, panels: Sequence[Panel]) -> Image:
    """Return the picture."""
    from PIL import Image

    canvas = Canvas(Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER))
    canvas.text((LEFT, 18), title, size=TITLE)
    _legend(canvas, panels[0])
    height = (HEIGHT - TOP - BOTTOM - BETWEEN * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        top = TOP + number * (height + BETWEEN)
        Frame(canvas, panel, top, top + height).draw()
    return canvas.image.reduce(SCALE)


class Canvas:
    """Draws in the pixels of the finished picture."""

    def __init__(self, image: Image) -> None:
        from PIL import ImageDraw

        self.image = image
        self._draw = ImageDraw.Draw(image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def dashes(self, x: float, end: float, y: float, colour: str) -> None:
        while x < end:
            self.line([(x, y), (min(x + 9, end), y)], colour, 1.5)
            x += 15

    def text(
        self, at: tuple[float, float], text: str, *, size: int = TEXT, colour: str = INK, anchor: str = "la"
    ) -> float:
        """Write a text and return its width."""
        from PIL import ImageFont

        font = ImageFont.load_default(size * SCALE)
        self._draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=colour, font=font, anchor=anchor)
        return float(self._draw.textlength(text, font)) / SCALE


class Frame:
    """One panel: axes, and the lines in them."""

    def __init__(self, canvas: Canvas, panel: Panel, top: float, bottom: float) -> None:
        self._canvas = canvas
        self._panel = panel
        self._top, self._bottom = top, bottom
        self._end = panel.step * max(map(len, panel.lines.values()))
        most = highest(panel)
        self._leavers = [
            (name, rates, colour)
            for (name, rates), colour in zip(panel.lines.items(), COLOURS, strict=False)
            if max(rates) > most
        ]
        # Room above the lines, and for a line of text about each that leaves.
        self._most = most * (1.1 + 0.15 * len(self._leavers))

    def x(self, seconds: float) -> float:
        return LEFT + seconds / self._end * (WIDTH - LEFT - RIGHT)

    def y(self, rate: float) -> float:
        """The place of a rate; what is higher than the panel ends at its upper edge."""
        return self._bottom - min(rate / self._most, 1.0) * (self._bottom - self._top)

    def draw(self) -> None:
        self._canvas.text((LEFT, self._top - 8), self._panel.title, colour=INK, anchor="ls")
        self._axes()
        # The subject last: over the others.
        for rates, colour in reversed(list(zip(self._panel.lines.values(), COLOURS, strict=False))):
            self._line(rates, colour)
        if 0 < self._panel.even <= self._most:
            self._canvas.dashes(LEFT, WIDTH - RIGHT, self.y(self._panel.even), EVEN)
        self._leaving()

    def _axes(self) -> None:
        unit, size = _unit(self._end)
        for tick in ticks(self._end / size, about=8):
            x = self.x(tick * size)
            self._canvas.line([(x, self._top), (x, self._bottom)], GRID)
            self._canvas.text((x, self._bottom + 6), f"{tick:g}", colour=FAINT, anchor="ma")
        for tick in ticks(self._most):
            y = self.y(tick)
            self._canvas.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID)
            self._canvas.text((LEFT - 8, y), f"{tick:g}", colour=FAINT, anchor="rm")
        self._canvas.line([(LEFT, self._top), (LEFT, self._bottom), (WIDTH - RIGHT, self._bottom)], INK, 1.5)
        self._canvas.text(
            ((LEFT + WIDTH - RIGHT) / 2, self._bottom + 26), f"{unit} since the outage ended", anchor="ma"
        )

    def _line(self, rates: Sequence[float], colour: str) -> None:
        points = []
        for number, rate in enumerate(rates):
            points += [
                (self.x(number * self._panel.step), self.y(rate)),
                (self.x((number + 1) * self._panel.step), self.y(rate)),
            ]
        self._canvas.line(points, colour, 2.5)

    def _leaving(self) -> None:
        """Say of a line that leaves the panel how high it goes."""
        for number, (name, rates, colour) in enumerate(self._leavers):
            most = max(rates)
            x = self.x((rates.index(most) + 1) * self._panel.step) + 8
            text = f"{name}: up to {rounded(most)} a second"
            self._canvas.text((x, self._top + 6 + 20 * number), text, colour=colour)


def highest(panel: Panel) -> float:
    """Return the rate that a panel has to show: all of its subject, of the others what does not tower."""
    subject, *others = (max(rates) for rates in panel.lines.values())
    peaks = sorted({subject, *others, panel.even}, reverse=True)
    for peak, lower in pairwise(peaks):
        if peak <= TOWERS * lower or peak == subject:
            return peak
    return subject


def ticks(most: float, about: int = 6) -> list[float]:
    """Return round numbers from 0 to `most`, about so many."""
    exact = most / about
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(each * power for each in (1, 2, 5, 10) if exact <= each * power)
    return [number * step for number in range(int(most / step) + 1)]


def _unit(length: float) -> tuple[str, float]:
    """Return in what to count a time, and its seconds."""
    if length < 300:
        return "Seconds", 1.0
    return ("Minutes", 60.0) if length < 4 * 3600 else ("Hours", 3600.0)


def _legend(canvas: Canvas, panel: Panel) -> None:
    x, y = float(LEFT), 58.0
    for name, colour in zip(panel.lines, COLOURS, strict=False):
        canvas.line([(x, y), (x + 26, y)], colour, 4)
        x += 34 + canvas.text((x + 34, y), name, anchor="lm") + 30
    if panel.even:
        canvas.dashes(x, x + 26, y, EVEN)
        canvas.text((x + 34, y), "even rate: all hosts by the window", anchor="lm")
