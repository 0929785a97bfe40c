"""Whatever a document does to the renderer costs one page, in bounded time; no child stays."""

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps

from pipeline.render.renderer import Renderer
from pipeline.render.settings import PageSettings
from schemas.errors import EngineError, Reason, RowError
from tests.documents import encrypted_pdf, endless_pdf, pdf, tiff
from tests.images import (
    RELEASED_PINPOINTS,
    encode,
    grey_tiff,
    odd_images,
    page,
    photograph,
    sixteen_bits,
)

MIB = 1024**2


@pytest.fixture
def write(tmp_path):
    def write_one(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write_one


def renderer(**settings) -> Renderer:
    return Renderer(PageSettings(((560, 560),), **settings))


def reason(ask, *arguments) -> Reason:
    with pytest.raises(RowError) as caught:
        ask(*arguments)
    return caught.value.reason


def image(png: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(png), formats=["PNG"])
    found.load()
    return found


def child_of(renderer: Renderer) -> psutil.Process:
    assert renderer._child
    return psutil.Process(renderer._child._process.pid)


def test_pages_come_in_their_size_and_each_is_another(write):
    path = write("a.pdf", pdf(["one", "two", "three"], sizes={2: (842, 595)}))
    with renderer() as r:
        assert r.open(path) == (3, None)
        pages = [image(r.image(number)) for number in (1, 2, 3)]
        assert [p.size for p in pages] == [r.size(number) for number in (1, 2, 3)]
    assert [p.size for p in pages] == [(395, 560), (560, 395), (395, 560)]
    assert {p.mode for p in pages} == {"L"}
    assert all(np.asarray(p).min() < 50 < 250 < np.asarray(p).max() for p in pages)
    assert pages[0].tobytes() != pages[2].tobytes()


def test_a_page_with_colours_keeps_them(write):
    path = write("a.pdf", pdf(["x"], content=b"1 0 0 rg 0 0 595 842 re f"))
    with renderer() as r:
        r.open(path)
        assert image(r.image(1)).getcolors() == [(395 * 560, (255, 0, 0))]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encrypted_pdf(), Reason.ENCRYPTED),
        (pdf([]), Reason.EMPTY_SOURCE),
        (pdf(["one", "two"])[:300], Reason.SOURCE_DAMAGED),
        (b"%PDF-1.7\n" + bytes(5000), Reason.SOURCE_DAMAGED),
        (b"<html>404 Not Found</html>", Reason.SOURCE_DAMAGED),
    ],
    ids=["encrypted", "no pages", "cut", "zeros", "html"],
)
def test_what_is_wrong_with_a_document_is_named_and_the_next_one_is_read(write, data, expected):
    with renderer() as r:
        assert reason(r.open, write("bad.pdf", data)) is expected
        assert r.open(write("good.pdf", pdf(["one"]))).pages == 1


def test_a_page_that_is_not_there_is_damaged_and_the_others_are_not(write):
    data = pdf(["one", "two", "three"]).replace(b"[4 0 R 6 0 R 8 0 R]", b"[4 0 R 0 0 R 8 0 R]")
    with renderer() as r:
        assert r.open(write("a.pdf", data)).pages == 3
        assert image(r.image(1)).size == image(r.image(3)).size
        assert reason(r.image, 2) is Reason.PAGE_DAMAGED


def test_a_page_that_never_ends_is_stopped_in_its_time_and_the_next_is_rendered(write):
    hang = write("hang.pdf", endless_pdf(2))
    with renderer(page_seconds=1.0) as r:
        assert r.open(hang).pages == 2
        first_child, started = child_of(r), time.monotonic()
        assert reason(r.image, 1) is Reason.TIMEOUT
        assert time.monotonic() - started < 10
        assert not first_child.is_running()
        assert r.size(2) == (395, 560)  # the same document, in a fresh child
        r.open(write("good.pdf", pdf(["one"])))
        assert image(r.image(1)).size == (395, 560)


def test_a_document_may_take_its_seconds_and_no_more(write):
    with renderer(page_seconds=1.0, document_seconds=1.5) as r:
        r.open(write("hang.pdf", endless_pdf(50)))
        started = time.monotonic()
        reasons = [reason(r.image, number) for number in range(1, 51)]
        assert time.monotonic() - started < 15
        assert set(reasons) == {Reason.TIMEOUT}
        r.open(write("good.pdf", pdf(["one"])))
        assert image(r.image(1)).size == (395, 560)


def test_a_page_that_takes_too_much_memory_costs_itself_alone(write):
    path = write("a.pdf", pdf(["one", "two", "three"], sizes={2: (9000, 9000)}))
    with renderer(dpi=72, memory_bytes=300 * MIB) as r:
        assert r.open(path).pages == 3
        sizes = [image(r.image(1)).size, image(r.image(3)).size]
        assert reason(r.image, 2) is Reason.CRASH
        sizes.append(image(r.image(3)).size)
    assert sizes == [(595, 842)] * 3


def test_a_page_a_hundred_thousand_points_wide_is_scaled_down(write):
    path = write("wide.pdf", pdf(["x"], size=(100_000, 100_000)))
    with renderer(memory_bytes=300 * MIB) as r:
        r.open(path)
        assert image(r.image(1)).size == (560, 560)
    with renderer(dpi=300, max_pixels=1_000_000, memory_bytes=300 * MIB) as r:
        r.open(path)
        assert image(r.image(1)).size == (1000, 1000)


def test_a_child_that_was_killed_between_two_pages_costs_none(write):
    with renderer() as r:
        r.open(write("a.pdf", pdf(["one", "two"])))
        first = r.image(1)
        child_of(r).kill()
        assert r.image(2) != first
        child_of(r).kill()
        assert r.image(1) == first


def test_frames_are_the_pixels_of_the_tiff(write):
    frames = [page(seed, (90, 120)) for seed in range(3)]
    frames[1] = photograph("china", (80, 60))
    with renderer() as r:
        assert r.open(write("a.tif", tiff(frames))) == (3, None)
        found = [image(r.image(number)) for number in (1, 2, 3)]
    assert [f.convert("RGB").tobytes() for f in found] == [f.tobytes() for f in frames]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "LA", "I;16"]
)
def test_frames_of_every_mode_come(write, mode):
    photo = photograph("china", (40, 30))
    frame = photo.convert("L").convert("I;16") if mode == "I;16" else photo
    if mode not in ("LAB", "I;16"):
        frame = photo.convert(mode)
    with renderer() as r:
        r.open(write("a.tif", tiff([frame, frame])))
        assert image(r.image(2)).size == (40, 30)


@pytest.mark.parametrize(("bits", "white"), [(8, 0), (8, 1), (12, 1), (16, 0), (16, 1)])
def test_frames_are_as_light_as_the_tiff_means_them(write, bits, white):
    with renderer() as r:
        assert r.open(write("a.tif", grey_tiff(bits, white, pages=2))).pages == 2
        frames = [np.asarray(image(r.image(number))) for number in (1, 2)]
    levels = {level for frame in frames for level in np.unique(frame).tolist()}
    assert levels <= ({191, 192} if bits == 8 else set(range(191 * 256, 193 * 256)))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_frames_of_16_bits_keep_them_in_either_order_of_bytes(write, order):
    grey = Image.fromarray(sixteen_bits().astype(order))
    with renderer() as r:
        r.open(write("a.tif", tiff([grey, grey])))
        np.testing.assert_array_equal(np.asarray(image(r.image(2))), sixteen_bits())


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("value", range(1, 9))
def test_frames_are_turned_as_their_tag_says(write, value, mode):
    photo = photograph("china", (80, 60)).convert(mode)
    photo.getexif()[0x0112] = value
    expected = ImageOps.exif_transpose(photo).convert("RGB")
    with renderer() as r:
        r.open(write("a.tif", tiff([photo, photo], tiffinfo={0x0112: value})))
        found = [image(r.image(number)).convert("RGB") for number in (1, 2)]
    assert [(f.size, f.tobytes()) for f in found] == [(expected.size, expected.tobytes())] * 2


def test_frames_after_a_break_are_told_of_and_those_before_it_come(write):
    whole = tiff([page(seed, (300, 400)) for seed in range(3)])
    with renderer() as r:
        opened = r.open(write("cut.tif", whole[: len(whole) * 2 // 3]))
        assert opened.pages == 2
        assert opened.broken
        assert image(r.image(1)).size == (300, 400)


def test_one_image_stays_an_image_whatever_its_name(write):
    single = [data for name, data in odd_images() if name in ("one-bit-fax.tif", "grey.jpg")]
    with renderer() as r:
        for i, data in enumerate([*single, b"", b"II*\0damaged"]):
            assert r.open(write(f"{i}.tif", data)) == (None, None)


def test_frames_beyond_the_budgets_are_refused_before_they_are_decoded(write):
    frames = [Image.new("1", (10, 10)), Image.new("1", (5000, 5000)), Image.new("1", (9, 9))]
    path = write("a.tif", tiff(frames, compression="group4"))
    with renderer(max_pixels=1_000_000, max_pages=2) as r:
        assert r.open(path).pages == 3  # one more than allowed: the rest is not counted
        assert reason(r.image, 2) is Reason.TOO_MANY_PIXELS
        assert image(r.image(3)).size == (9, 9)


def test_the_released_grids_cross_the_pipe(write):
    with Renderer(PageSettings(RELEASED_PINPOINTS)) as r:
        r.open(write("a.pdf", pdf(["one"])))
        assert image(r.image(1)).size == (1008, 1426)


def test_an_image_is_tried_out_and_one_that_takes_too_much_memory_is_convicted(write):
    small, large = (encode(Image.new("RGB", (side, side)), "PNG") for side in (90, 9000))
    with renderer(memory_bytes=400 * MIB) as r:
        r.decode(small)
        assert reason(r.decode, large) is Reason.CRASH
        r.decode(b"no image")  # for whoever prepares it to say
        r.open(write("a.pdf", pdf(["one"])))
        r.decode(small)
        assert reason(r.decode, large) is Reason.CRASH
        r.open(write("a.pdf", pdf(["one"])))
        assert image(r.image(1)).size == (395, 560)


def test_a_child_ends_with_its_parent(tmp_path):
    path = tmp_path / "hang.pdf"
    path.write_bytes(endless_pdf())
    code = (
        "from pipeline.render.renderer import Renderer\n"
        "from pipeline.render.settings import PageSettings\n"
        "r = Renderer(PageSettings())\n"
        f"r.open({str(path)!r})\n"
        "print(r._child._process.pid, flush=True)\n"
        "r.image(1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    child.wait(timeout=10)


def test_the_child_knows_neither_ray_nor_torch():
    code = (
        "import sys, pipeline.render.worker\n"
        "assert not {'ray', 'torch', 'pyarrow', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_renderer_that_does_not_start_says_why(write, monkeypatch):
    monkeypatch.setattr(sys, "executable", _script(Path(write("python", b""))))
    with pytest.raises(EngineError, match="no such library"):
        renderer().open("a.pdf")


def _script(path: Path) -> str:
    path.write_text("#!/bin/sh\necho 'ImportError: no such library' >&2; exit 1\n")
    path.chmod(0o755)
    return str(path)


def test_an_image_that_is_late_names_the_limit_of_images_not_of_pages():
    image = encode(Image.effect_noise((3000, 3000), 90), "PNG")
    with Renderer(PageSettings(page_seconds=1e-3)) as r, pytest.raises(RowError) as error:
        r.decode(image)
    assert error.value.reason is Reason.TIMEOUT
    assert "(--decode-seconds)" in error.value.message
