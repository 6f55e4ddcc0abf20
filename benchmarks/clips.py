"""Conversion of videos against plain decoding of the same files, and its memory against their length.

    OMP_NUM_THREADS=1 python benchmarks/clips.py [--rounds 5] [--videos FOLDER] [--only speed|commands|memory|reading]

- speed: PyAV decodes every frame of pictures and sound, one thread, and throws it away; `shards convert --clips` at its
  defaults (8 frames a second of 256 px, sound at 48 kHz) does that, shrinks, encodes, hashes and writes. CPU time of
  one process each, in turns, so that both meet the same machine. Videos are made here (H.264 and AAC, moving textures);
  with `--videos` those of a folder are measured as well.
- commands: the same beside the command `ffmpeg`, which decodes with nothing else to do (benchmarks/clips_commands.py).
- needed: decoding all, and no more than what makes frames and sound of it: the kept frames are scaled and encoded, the
  sound is brought to one channel and encoded. A conversion that did nothing else would take as long; one that leaves
  frames undecoded may take less.
- reading: what a sample costs in training (benchmarks/clips_reading.py).
- memory: peak of one process that converts a video of a minute, of ten and of an hour.

Writes benchmarks/results/clips.json and clips.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from clips_commands import commands_table, measure_commands
from clips_reading import measure_reading, reading_table

from largescale.run.environment import environment
from shards.clips.clip import ClipSettings
from shards.clips.planes import jpeg_of
from shards.clips.sound import to_flac
from shards.conversion.convert import Options, convert

RESULTS = Path(__file__).resolve().parent / "results"
RATE, SOUND_RATE = 25, 48_000

MEASURED = """
import sys
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert
manifest = convert(sys.argv[1], sys.argv[2], Options("memory", clips=ClipSettings()))
[line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(manifest.num_samples, 1024 * int(line.split()[1]))
"""


def write_textures(path: Path, width: int, height: int, seconds: int) -> None:
    """A video of textures that move at three speeds, with a chord."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (3, height // 8 + 1, width // 4 + 1, 3), np.uint8)
    layers = [np.kron(layer, np.ones((8, 8, 1), np.uint8))[:height] for layer in coarse]
    heard = sum(np.sin(2 * np.pi * hertz * np.arange(seconds * SOUND_RATE) / SOUND_RATE) for hertz in (220, 277, 330))
    sound = np.rint(6000 * heard).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        audio: Any = container.add_stream("aac", rate=SOUND_RATE, layout="mono")
        for number in range(seconds * RATE):
            thirds = np.array_split(np.arange(height), 3)
            pixels = np.concatenate(
                [
                    np.roll(layer, -number * speed, axis=1)[rows, :width]
                    for layer, rows, speed in zip(layers, thirds, (1, 3, 5), strict=True)
                ]
            )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
            for place in range(number * SOUND_RATE // RATE, (number + 1) * SOUND_RATE // RATE, 960):
                block = av.AudioFrame.from_ndarray(sound[None, place : place + 960], format="s16", layout="mono")
                block.sample_rate, block.pts, block.time_base = SOUND_RATE, place, Fraction(1, SOUND_RATE)
                container.mux(audio.encode(block))
        container.mux(stream.encode(None))
        container.mux(audio.encode(None))


def repeat(path: Path, out: Path, times: int) -> None:
    """A video that shows another one several times, without encoding it again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(out), "w") as target, av.open(str(path)) as source:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        seconds = Fraction(source.duration, av.time_base) + Fraction(1, 10)
        for number in range(times):
            source.seek(0)
            for packet in source.demux():
                if packet.dts is None:
                    continue
                shift = int(number * seconds / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[packet.stream_index]
                target.mux(packet)


def videos_in(temporary: Path, others: Path | None) -> dict[str, Path]:
    """Folders with a video each, by what it is called: those made here, and those of another folder."""
    found = {}
    for width, height in ((1280, 720), (640, 360), (320, 240)):
        folder = found[f"{width} x {height}, made here"] = temporary / f"{width}x{height}"
        write_textures(folder / "textures.mp4", width, height, 20)
    for video in sorted(others.iterdir()) if others else []:
        folder = found[video.name] = temporary / video.stem
        folder.mkdir()
        shutil.copy(video, folder)
    return found


def decode(folder: Path) -> int:
    """Decode all pictures and sounds of a folder's videos; returns the number of frames of pictures."""
    count = 0
    for path in sorted(folder.iterdir()):
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "NONE"
            for packet in container.demux(container.streams.video[0], *container.streams.audio[:1]):
                frames = packet.decode()
                count += len(frames) if packet.stream.type == "video" else 0
    return count


def needed(folder: Path) -> int:
    """Decode all, and encode what is kept as the defaults of conversion say; returns the number of bytes."""
    settings, num_bytes = ClipSettings(), 0
    scale = av.video.reformatter
    quality = scale.Interpolation.AREA | scale.Interpolation.BITEXACT
    for path in sorted(folder.iterdir()):
        with av.open(str(path)) as container:
            video: Any = container.streams.video[0]
            video.thread_type = "NONE"
            side = min(1.0, settings.frame_side / min(video.width, video.height))
            size = max(1, round(video.width * side)), max(1, round(video.height * side))
            reformatter, last, blocks = scale.VideoReformatter(), -1, []
            resampler = av.AudioResampler("s16", "mono", settings.sound_rate)
            for packet in container.demux(video, *container.streams.audio[:1]):
                for frame in packet.decode():
                    if packet.stream.type == "audio":
                        blocks += resampler.resample(frame)
                    elif (number := int(frame.time * settings.frame_rate + 1 / 8)) > last:
                        last, form = number, {"dst_color_range": "JPEG", "dst_colorspace": "ITU601"}
                        small = reformatter.reformat(frame, *size, "yuvj420p", interpolation=quality, threads=1, **form)
                        planes = [
                            np.frombuffer(one, np.uint8).reshape(one.height, -1)[:, : one.width] for one in small.planes
                        ]
                        num_bytes += len(jpeg_of(tuple(planes), 90))
            if blocks:
                heard = np.concatenate([block.to_ndarray().reshape(-1) for block in blocks])
                length = round(settings.clip_seconds * settings.sound_rate)
                num_bytes += sum(
                    len(to_flac(heard[at : at + length], settings.sound_rate)) for at in range(0, len(heard), length)
                )
    return num_bytes


def speed(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of decoding a folder, of decoding and encoding what is kept, and of converting, in turns."""
    found: dict[str, list[float]] = {"decode": [], "needed": [], "convert": []}
    frames = clips = num_bytes = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(rounds + 1):
            started = time.process_time()
            frames = decode(folder)
            decoded = time.process_time()
            needed(folder)
            encoded = time.process_time()
            manifest = convert(folder, Path(temporary) / f"out-{number}", Options("speed", clips=ClipSettings()))
            converted = time.process_time()
            assert manifest is not None
            clips, num_bytes = manifest.num_samples, manifest.num_bytes
            shutil.rmtree(Path(temporary) / f"out-{number}")
            if number:  # the first one warms up
                found["decode"].append(decoded - started)
                found["needed"].append(encoded - decoded)
                found["convert"].append(converted - encoded)
    ratios = [one / other for one, other in zip(found["decode"], found["convert"], strict=True)]
    return {
        "frames": frames,
        "clips": clips,
        "bytes": num_bytes,
        "decode_cpu_s": statistics.median(found["decode"]),
        "needed_cpu_s": statistics.median(found["needed"]),
        "convert_cpu_s": statistics.median(found["convert"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "needed_ratio": statistics.median(
            one / other for one, other in zip(found["needed"], found["convert"], strict=True)
        ),
    }


def memory(folder: Path) -> dict[str, dict[str, int]]:
    """Clips and peak bytes of a process that converts a video, by its minutes."""
    minute, found = folder / "minute.mp4", {}
    write_textures(minute, 320, 180, 60)
    for minutes in (1, 10, 60):
        source = folder / f"of-{minutes}"
        repeat(minute, source / "video.mp4", minutes)
        command = [sys.executable, "-c", MEASURED, str(source), str(folder / f"out-{minutes}")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        found[str(minutes)] = {"clips": int(said[0]), "peak_bytes": int(said[1])}
        shutil.rmtree(folder / f"out-{minutes}")
        shutil.rmtree(source)
    return found


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Clips: conversion against decoding, and memory",
        "",
        f"{results['date']}, {results['machine']}; PyAV {results['pyav']}. `OMP_NUM_THREADS=1 python "
        f"benchmarks/clips.py`; CPU time of one process, in turns; medians of {results['rounds']} rounds; load of the "
        f"machine {results['load']:.0f}.",
        "",
        "Decoding is PyAV's of all pictures and all sound, with the opening of the file. Needed are that, and scaling "
        "and encoding what is kept, with nothing around it; conversion can take less, since of H.264 it leaves frames "
        "undecoded that it can do without.",
        "",
        "| videos | frames | clips | decoding, s | needed, s | converting, s | decoding / converting "
        "| needed / converting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.get("speed", {}).items():
        span = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        lines.append(
            f"| {name} | {row['frames']:,} | {row['clips']} | {row['decode_cpu_s']:.2f} | {row['needed_cpu_s']:.2f} "
            f"| {row['convert_cpu_s']:.2f} | {row['ratio']:.2f} ({span}) | {row['needed_ratio']:.2f} |"
        )
    lines += commands_table(results["commands"]) if results.get("commands") else []
    lines += ["", "Memory of one process (320 x 180, 25 frames a second, with sound):", ""]
    lines += ["| minutes of the video | clips | peak, MB |", "|---|---|---|"]
    for minutes, row in results.get("memory", {}).items():
        lines.append(f"| {minutes} | {row['clips']} | {row['peak_bytes'] / 1e6:.0f} |")
    lines += reading_table(results["reading"]) if "reading" in results else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--videos", type=Path, help="a folder of videos to measure as well")
    parser.add_argument("--only", choices=["speed", "commands", "memory", "reading"])
    arguments = parser.parse_args()
    path = RESULTS / "clips.json"
    results: dict[str, Any] = json.loads(path.read_text()) if arguments.only and path.exists() else {}
    facts = environment()
    results |= {"date": time.strftime("%Y-%m-%d"), "pyav": av.__version__}
    if arguments.only != "commands":
        results |= {"rounds": arguments.rounds, "load": os.getloadavg()[0]}
    results["machine"] = f"{facts['processor']}, {facts['cpu_cores']} cores"
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.only in (None, "reading"):
            write_textures(Path(temporary) / "read" / "textures.mp4", 320, 180, 240)
            results["reading"] = measure_reading(Path(temporary) / "read", Path(temporary), arguments.rounds)
        videos = videos_in(Path(temporary), arguments.videos) if arguments.only not in ("memory", "reading") else {}
        if arguments.only in (None, "speed"):
            results["speed"] = {name: speed(folder, arguments.rounds) for name, folder in videos.items()}
        if arguments.only in (None, "commands"):
            rows = {
                name: measure_commands(next(folder.iterdir()), Path(temporary), arguments.rounds)
                for name, folder in videos.items()
            }
            results["commands"] = {name: row for name, row in rows.items() if row}
        if arguments.only in (None, "memory"):
            results["memory"] = memory(Path(temporary))
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
