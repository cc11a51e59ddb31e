"""Systems without trained weights: text encoders inside others too."""

from sana_lab.bench.untrained import with_random_text_encoder, without_cache


def test_an_encoder_inside_another_is_random_and_without_a_cache():
    inner = {"name": "llm", "model": "google/gemma-2-2b-it", "weights": "x.safetensors"}
    system = with_random_text_encoder({"dit": {"name": "sana"}, "text_encoder": {"name": "adapter", "encoder": inner}})
    assert system["text_encoder"] == {
        "name": "adapter",
        "encoder": {"name": "llm", "model": "google/gemma-2-2b-it", "random_init": True},
    }
    assert without_cache(system["text_encoder"])["encoder"]["cache"] is False
    assert without_cache({"name": "t5", "model": None}) == {"name": "t5", "model": None}
    plain = with_random_text_encoder({"text_encoder": {"name": "t5", "model": None}})
    assert plain["text_encoder"] == {"name": "t5", "model": None}
