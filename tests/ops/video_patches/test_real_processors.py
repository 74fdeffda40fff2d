"""Each family's tensors against those of transformers' own video processor, wherever torchvision lets it run.

The tolerance is none: on the CPU the same arithmetic is done in the same order, from the resize on uint8 to the division.
"""

import pytest
import torch

from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.tiny import tiny_model

PROCESSORS = {
    "qwen2_5_vl": "qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor",
    "qwen3_vl": "qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor",
    "llava_onevision": "llava_onevision.video_processing_llava_onevision.LlavaOnevisionVideoProcessor",
    "internvl": "internvl.video_processing_internvl.InternVLVideoProcessor",
    "video_llama_3": "video_llama_3.video_processing_video_llama_3.VideoLlama3VideoProcessor",
}


@pytest.fixture(autouse=True, scope="module")
def torchvision():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: one built for another torch
        pytest.skip(f"transformers' video processors need torchvision, which does not import here: {error}")


def processor_of(name: str, config, processing):
    module, class_name = PROCESSORS[name].rsplit(".", 1)
    processor = getattr(pytest.importorskip(f"transformers.models.{module}"), class_name)
    options = {"image_mean": list(processing.mean), "image_std": list(processing.std)}
    if processing.size is None:
        vision = config.vision_config
        options |= {
            "size": {"shortest_edge": processing.min_pixels, "longest_edge": processing.max_pixels},
            "patch_size": vision.patch_size,
            "merge_size": getattr(vision, "spatial_merge_size", 2),
        }
        if name != "video_llama_3":
            options["temporal_patch_size"] = vision.temporal_patch_size
    else:
        options["size"] = dict(zip(("height", "width"), processing.size, strict=True))
    return processor(do_sample_frames=False, **options)


# An odd T shrunk; an even T that fits; growing from less than a patch; a long, thin frame; a video that repeats itself.
@pytest.mark.parametrize("shape", [(5, 61, 143), (8, 56, 56), (2, 11, 9), (3, 30, 200), (7, 90, 64)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_tensors_equal_the_processors(name, shape):
    model, tokenizer = tiny_model(name)
    family, config = FAMILIES[name], model.config
    frames = torch.randint(256, (*shape, 3), dtype=torch.uint8)
    frames[-2:] = frames[-2:-1]
    processing = family.processing(config)
    theirs = processor_of(name, config, processing)(videos=[frames.permute(0, 3, 1, 2)], return_tensors="pt")
    ours = family.video_inputs(config, tokenizer, frames, processing=processing).arguments()
    for key, found in ours.items():
        expected = theirs["pixel_values_videos" if key == "pixel_values" else key]  # InternVL's are images to its model
        assert torch.equal(found, expected.view(found.shape)), key


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "video_llama_3"])
def test_published_bounds(name):
    """The defaults of the class are the defaults of the family."""
    model, _ = tiny_model(name)
    module, class_name = PROCESSORS[name].rsplit(".", 1)
    published = getattr(pytest.importorskip(f"transformers.models.{module}"), class_name)()
    defaults = FAMILIES[name].default_processing(model.config)
    assert (defaults.min_pixels, defaults.max_pixels) == (
        published.size["shortest_edge"],
        published.size["longest_edge"],
    )
    assert (list(defaults.mean), list(defaults.std)) == (list(published.image_mean), list(published.image_std))
