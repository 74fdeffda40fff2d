"""What a run says of itself before its first step."""

from tests.world import options


def test_attention_and_its_reason(world, tmp_path, in_one_process, capsys):
    in_one_process(options(world, tmp_path / "out", max_steps=1))
    lines = capsys.readouterr().err.splitlines()
    assert "attention: synpo_fast_segments, because synpo_fast_varlen needs a CUDA device, got cpu" in lines
