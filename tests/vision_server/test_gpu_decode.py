"""Which decoder decodes what, where there is a GPU: its decoder is played by Pillow on the CPU, in the same shape."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image as Pillow

from vision_server.decoders import ImageFile
from vision_server.gpu_decode import GpuDecoder, find_gpu_decoder


def picture(shade: int, width: int = 203, height: int = 101) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x % 256, y % 256, np.full_like(x, shade)], -1).astype(np.uint8)


def jpeg(shade: int = 90, **size: int) -> bytes:
    return simplejpeg.encode_jpeg(picture(shade, **size), 95)


class FakeGpu:
    """torchvision.io.decode_jpeg with a list and a CUDA device: fails as a whole where one file is bad."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def decode_all(self, files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.batches.append(len(files))
        assert self.go_on.wait(30)
        pictures = []
        for file in files:
            assert file.dtype == torch.uint8 and file.ndim == 1
            opened = Pillow.open(io.BytesIO(file.numpy().tobytes()))
            if opened.info.get("progressive"):
                raise RuntimeError("nvjpegDecodeJpegHost failed")
            pictures.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
        return pictures


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_the_gpu_gives_what_the_cpu_gives(reduction: int) -> None:
    gpu = FakeGpu()
    with ImageFile(jpeg()) as file:
        on_gpu = file.decode(reduction, GpuDecoder(gpu.decode_all))
        on_cpu = file.decode(reduction)
    assert gpu.batches == [1]
    assert on_gpu.shape == on_cpu.shape and on_gpu.dtype == np.uint8 and on_gpu.flags.c_contiguous
    assert np.abs(on_gpu.astype(int) - on_cpu)[: 101 // reduction, : 203 // reduction].max() <= (
        0 if reduction == 1 else 6
    )


def test_a_turned_picture_is_turned_whoever_decodes_it() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Pillow.fromarray(picture(90)).save(file, "JPEG", exif=exif)
    with ImageFile(file.getvalue()) as opened:
        assert np.array_equal(opened.decode(1, GpuDecoder(FakeGpu().decode_all)), opened.decode())


def test_what_the_gpu_refuses_the_cpu_decodes() -> None:
    gpu = FakeGpu()
    file = io.BytesIO()
    Pillow.fromarray(picture(90)).save(file, "JPEG", progressive=True)
    with ImageFile(file.getvalue()) as opened:
        assert np.array_equal(opened.decode(1, GpuDecoder(gpu.decode_all)), opened.decode())
    assert gpu.batches == [1]


def test_only_plain_jpegs_go_to_the_gpu() -> None:
    gpu = FakeGpu()
    for form, mode in (("PNG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "RGB")):
        file = io.BytesIO()
        Pillow.fromarray(picture(90)).convert(mode).save(file, form)
        with ImageFile(file.getvalue()) as opened:
            opened.decode(1, GpuDecoder(gpu.decode_all))
    assert gpu.batches == []


def test_who_waits_is_decoded_together_and_a_bad_file_fails_alone() -> None:
    # given: the GPU is busy with one file while five more come, one of them a bad one
    gpu = FakeGpu()
    decoder = GpuDecoder(gpu.decode_all)
    gpu.go_on.clear()
    contents = [jpeg(10 * number) for number in range(6)]
    contents[3] = b"\xff\xd8\xff no picture"
    with ThreadPoolExecutor(6) as threads:
        first = threads.submit(decoder.decode, contents[0], 203, 101, 1)
        while not gpu.batches:
            time.sleep(0.001)
        others = [threads.submit(decoder.decode, content, 203, 101, 1) for content in contents[1:]]
        while len(decoder._waiting) < 5:
            time.sleep(0.001)
        gpu.go_on.set()
        found = [job.result(30) for job in [first, *others]]
    # then: one call for the five, and each alone after it failed
    assert gpu.batches == [1, 5, 1, 1, 1, 1, 1]
    for number, rgb in enumerate(found):
        if number == 3:
            assert rgb is None
        else:
            assert rgb is not None
            assert np.array_equal(rgb, simplejpeg.decode_jpeg(contents[number]))


def test_a_picture_of_another_size_than_the_header_says_is_not_taken() -> None:
    assert GpuDecoder(FakeGpu().decode_all).decode(jpeg(), 64, 64, 1) is None


def test_without_cuda_there_is_no_gpu_decoder() -> None:
    assert find_gpu_decoder("cpu") is None
    if not torch.cuda.is_available():
        assert find_gpu_decoder("cuda:0") is None
