"""A folder of images as a video: order, sizes, damage. The truth is Pillow's reading where the format is lossless."""

import numpy as np
import pytest
from PIL import Image

from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.data.video.video_path import image_files
from synpo_fast.testing.clips import draw_frame, read_barcode


def save(folder, names, width=97, height=75):
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(draw_frame(index, width, height)).save(folder / name)
    return folder


def barcodes(frames):
    return [read_barcode(frame.numpy()) for frame in frames]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "JPG", "webp"])
def test_images_in_natural_order(tmp_path, suffix):
    folder = save(tmp_path / "frames", [f"img_{number}.{suffix}" for number in range(12)])
    frames, info = decode_frames(folder)
    assert barcodes(frames) == list(range(12)), "img_2 before img_10"
    assert (info.codec, info.backend, info.num_frames, info.width, info.height) == ("images", "images", 12, 97, 75)
    assert info.fps == 1.0 and info.duration == 12.0
    frames, info = decode_frames(folder, indices=[11, 0, 11, 5])
    assert barcodes(frames) == [11, 0, 11, 5]
    assert decode_frames(folder, times=[0.0, 2.5, 12.0])[1].indices == (0, 2, 11)


def test_lossless_images_are_exact(tmp_path):
    folder = save(tmp_path, ["a.png", "b.png"])
    assert np.array_equal(decode_frames(folder, indices=[1])[0][0].numpy(), draw_frame(1, 97, 75))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_other_pixel_formats_become_rgb(tmp_path, mode):
    picture = Image.fromarray(draw_frame(7, 96, 64))
    if mode == "I;16":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(tmp_path / "a.png")
    else:
        picture.convert(mode).save(
            tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), **({"quality": 95} if mode == "CMYK" else {})
        )
    frames, _ = decode_frames(tmp_path)
    assert barcodes(frames) == [7] and tuple(frames.shape) == (1, 64, 96, 3)


def test_the_content_decides_not_the_suffix(tmp_path):
    save(tmp_path, ["0.png"])
    (tmp_path / "0.png").rename(tmp_path / "0.jpg")
    assert barcodes(decode_frames(tmp_path)[0]) == [0]


def test_other_files_and_hidden_ones_are_no_frames(tmp_path):
    folder = save(tmp_path, ["0.png", "1.png"])
    (folder / "notes.txt").write_text("no frame")
    (folder / "._2.png").write_text("no frame")
    assert [file.name for file in image_files(folder)] == ["0.png", "1.png"]
    assert image_files(save(tmp_path / "x", ["b2.png", "b10.png", "a.png", "10.png", "9.png", "09.png"])) == [
        tmp_path / "x" / name for name in ("09.png", "9.png", "10.png", "a.png", "b2.png", "b10.png")
    ]


def test_images_of_different_sizes_are_an_error(tmp_path):
    folder = save(tmp_path, ["0.png", "1.png"])
    Image.fromarray(draw_frame(2, 96, 75)).save(folder / "2.png")
    assert barcodes(decode_frames(folder, indices=[0, 1])[0]) == [0, 1]
    with pytest.raises(VideoError, match=r"2.png: is 96x75, the first image of its folder is 97x75"):
        decode_frames(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"text", "neither JPEG, PNG nor WebP"),
        (b"\xff\xd8\xff\xe0 cut", "1.png: .*(decoded|damaged)"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, message):
    folder = save(tmp_path, ["0.png"])
    (folder / "1.png").write_bytes(content)
    with pytest.raises(VideoError, match=message):
        decode_frames(folder)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_cut_image_is_an_error(tmp_path, suffix):
    folder = save(tmp_path, [f"0.{suffix}"])
    content = (folder / f"0.{suffix}").read_bytes()
    (folder / f"0.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match=f"0.{suffix}: (is damaged|cannot be decoded)"):
        decode_frames(folder)


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path):
    folder = save(tmp_path, ["0.png"])
    content = bytearray((folder / "0.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR; its checksum no longer holds, which decoders overlook
    (folder / "0.png").write_bytes(content)
    with pytest.raises(VideoError, match=r"0.png: cannot be decoded"):
        probe_video(folder)


def test_a_folder_that_changed_since_it_was_probed(tmp_path):
    info = probe_video(save(tmp_path, ["0.png", "1.png"]))
    (tmp_path / "1.png").unlink()
    with pytest.raises(VideoError, match="had 2 images, now it has 1"):
        decode_frames(tmp_path, indices=[0], info=info)
