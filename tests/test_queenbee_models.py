"""Which models QueenBee's workers can serve."""

from __future__ import annotations

import pytest

from router.queenbee import QueenBeeRegistration, offers
from router.queenbee_models import Hardware, Offers, canonical, is_same, model_size, name_for
from tests.workerbee import LARGE, SMALL, registration_031, wiki_registration
from worker.protocol import ModelKind

CARDS = Hardware(nv_mb=24_576, ram_bytes=64e9, disk_mb=500_000)
NONE = Hardware(ram_bytes=64e9, disk_mb=500_000)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("TheBloke/WizardLM-13B-GGUF:Q4_K_M", 13 * 0.6),
        ("TheBloke/Llama-2-70b-chat-GGUF:Q2_K", 70 * 0.4),
        ("someone/Mixtral-8x7B-GGUF:Q5_K_M", 56 * 0.7),
        ("someone/Qwen-0.5b:Q8_0", 0.5),
        ("someone/model-7b:Q8", 7),
        ("someone/model-7b:f16", 7),
        ("someone/CoolModelv2", 13),
        ("TheBloke/CoolModelv2:Q4_K_M", 13 * 0.6),
        ("fastembed:BAAI/bge-small-en-v1.5", 1),
    ],
)
def test_all_digits_of_a_size_are_read(name: str, size: float):
    """QB-R8, E1-10: 13b is not 3, and 70b is not 0."""
    assert model_size(name) == pytest.approx(size)


@pytest.mark.parametrize(
    ("asked", "listed", "same"),
    [
        ("r/m:Q8_0", "r/m:Q8", True),
        ("r/m:Q8", "r/m:Q8_0", True),
        ("r/m:q8_0", "r/m:Q8_0", True),
        ("r/m:Q4_K_M", "r/m:Q4_K_M", True),
        ("r/m:Q4_K_M", "r/m:Q4_K_S", False),
        ("r/m:Q4_K_M", "r/m:Q4", False),
        ("r/m:Q80", "r/m:Q8", False),
        ("r/other:Q8_0", "r/m:Q8", False),
        ("r/m", "r/m:Q8", False),
    ],
)
def test_quantisations_match_by_their_beginning_and_k_quants_exactly(
    asked: str, listed: str, same: bool
):
    """RC-4."""
    assert is_same(asked, listed) is same


def test_hardware_decides_over_what_is_not_listed():
    """QB-R7, RC-6."""
    assert name_for(SMALL, [], CARDS) == SMALL
    assert name_for(LARGE, [], CARDS) is None
    assert name_for(SMALL, [], NONE) is None
    assert name_for(SMALL, [SMALL], NONE) == SMALL
    assert name_for("r/m-7b:Q8_0", ["r/m-7b:Q8"], CARDS) == "r/m-7b:Q8"
    nearly = Hardware(nv_mb=3600, ram_bytes=64e9, disk_mb=500_000)
    assert name_for(SMALL, [], nearly) == SMALL
    assert name_for(SMALL, [], Hardware(nv_mb=24_576, ram_bytes=64e9, disk_mb=1000)) is None
    assert name_for("gpt-4", [], CARDS) is None
    assert name_for("https://example.org/a.gguf", [], CARDS) is None


def test_short_names_stand_for_repositories_and_for_what_web_workers_call_them():
    """QB-R15."""
    vicuna = "TheBloke/vicuna-7B-v1.5-GGUF:Q4_K_M"
    assert canonical("vicuna-7B-q4") == vicuna and canonical("Llama-2-13b-chat-q4").endswith(
        "Llama-2-13B-chat-GGUF:Q4_K_M"
    )
    assert canonical("webgpu/vicuna-7B-q4") == "webgpu/vicuna-7B-q4"
    assert canonical(SMALL) == SMALL
    web = Hardware(ram_bytes=16e9, web=True)
    assert name_for(vicuna, [], web) == "webgpu/vicuna-v1-7b-q4f32_0"
    assert name_for("webgpu/vicuna-v1-7b-q4f32_0", [], web) == "webgpu/vicuna-v1-7b-q4f32_0"
    assert name_for("webgpu/vicuna-v1-7b-q4f32_0", [], CARDS) is None
    assert name_for(SMALL, [], web) is None


def test_the_units_of_the_wiki_and_of_workerbee_are_told_apart():
    """QB-P5."""
    wiki = QueenBeeRegistration.model_validate(wiki_registration()).hardware
    newer = QueenBeeRegistration.model_validate(registration_031()).hardware
    assert (wiki.ram_bytes, wiki.disk_mb, wiki.nv_mb) == (32e9, 500_000, 24_576)
    assert (newer.ram_bytes, newer.disk_mb, newer.nv_mb) == (64e9, 500_000, 24_576)


def test_a_worker_serves_what_its_capabilities_say():
    """QB-P7: an absent list is an old worker's."""
    fast = "fastembed:BAAI/bge-small-en-v1.5"
    old = offers(QueenBeeRegistration.model_validate(wiki_registration()))
    assert old(ModelKind.TEXT, SMALL) and old(ModelKind.EMBEDDING, SMALL)
    assert old(ModelKind.EMBEDDING, fast) is None
    can = ["fast-embed"]
    embeds = offers(QueenBeeRegistration.model_validate(registration_031(capabilities=can)))
    assert embeds(ModelKind.EMBEDDING, fast) and embeds(ModelKind.TEXT, fast) is None
    assert embeds(ModelKind.TEXT, SMALL) is None


@pytest.mark.parametrize(
    "hardware",
    [CARDS, NONE, Hardware(ram_bytes=16e9, web=True), Hardware(ram_bytes=1e9, web=True)],
)
def test_other_routers_are_told_what_a_worker_would_serve(hardware: Hardware):
    """Rounded down: what a worker is offered elsewhere it can hold, and nearly all that it can."""
    here = Offers(("r/m-7b:Q8",), hardware, frozenset({"llama-infer", "sdxl"}))
    told = Offers.read(here.as_json(), here.listed)
    for name in (
        SMALL,
        LARGE,
        "r/m-7b:Q8_0",
        "vicuna-7B-q4",
        "webgpu/vicuna-v1-7b-q4f32_0",
        "gpt-4",
    ):
        for kind in (ModelKind.TEXT, ModelKind.IMAGE, ModelKind.EMBEDDING):
            assert told(kind, name) == here(kind, name), (kind, name)
    sizes = [0.1 * n for n in range(1, 2000)]
    holds = [size for size in sizes if hardware.holds(size)]
    told_of = [size for size in sizes if told.hardware.holds(size)]
    assert set(told_of) <= set(holds) and len(told_of) >= 0.9 * len(holds)


def test_machines_that_differ_in_a_byte_are_one_sum():
    machines = [Hardware(nv_mb=24_576, ram_bytes=32e9 + n, disk_mb=500_000.0 - n) for n in range(5)]
    assert len({machine.largest() for machine in machines}) == 1


@pytest.mark.parametrize("least", [4e-316, 1e-310, 1e-9, 0.0])
@pytest.mark.parametrize("most", [1e6, 1.7e308])
def test_a_machine_of_absurd_numbers_is_summed_up_as_well(least: float, most: float):
    """They come from anybody; and what cannot be summed up would take its router from the market."""
    for web in (False, True):
        for ram_bytes, other in ((least, most), (most, least), (least, least), (most, most)):
            machine = Hardware(nv_mb=other, ram_bytes=ram_bytes, disk_mb=other, web=web)
            largest = machine.largest()
            assert 0 <= largest <= 1e6
            assert largest == 0 or machine.holds(0.99 * largest)
