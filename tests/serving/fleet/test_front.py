"""The fleet over HTTP: real requests to a real batcher."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import afcache
from tests.serving.fleet.conftest import DEFAULTS, Client
from tests.support.mini_flux import fresh_mini_flux

pytestmark = [pytest.mark.host, pytest.mark.xdist_group("fleet")]
PROMPT = "a handwritten seven on a flower"


def test_what_is_asked_for_is_drawn_as_the_pipeline_draws_it(client: Client):
    accepted = client.submit(prompt=PROMPT, steps=14, seed=3, preset="quality")
    assert accepted["state"] in ("waiting", "drawing")
    seen = client.wait(accepted["id"])
    assert (seen["state"], seen["done"], seen["steps"], seen["replica"]) == ("drawn", 14, 14, "here")
    status, data = client.ask(f"/requests/{accepted['id']}/image")
    assert status == 200
    pipe = fresh_mini_flux()
    afcache.compile_pipeline(pipe, preset="quality", compile=False)
    expected = pipe(PROMPT, num_inference_steps=14, generator=torch.Generator().manual_seed(3), **DEFAULTS).images[0]
    assert seen["pattern"] == afcache.report(pipe).pattern()
    difference = np.abs(np.asarray(Image.open(io.BytesIO(data)), dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


def test_it_can_be_watched_and_given_up(client: Client):
    name = client.submit(prompt=PROMPT, steps=900, tolerance=0.0)["id"]
    while (seen := client.look(name))["done"] < 5:
        assert seen["state"] in ("waiting", "drawing")
    assert (seen["state"], seen["steps"]) == ("drawing", 900)
    assert set(seen["pattern"]) == {"F"}
    assert client.ask(f"/requests/{name}/image")[0] == 404
    given_up = json.loads(client.ask(f"/requests/{name}", method="DELETE")[1])
    assert given_up["state"] == "cancelled"
    status, said = client.ask(f"/requests/{name}/image")
    assert (status, json.loads(said)["detail"]) == (404, f"request {name} has no image: it is cancelled")


def test_one_key_is_accepted_once(client: Client):
    bodies = [
        json.loads(client.ask("/requests", method="POST", body={"prompt": PROMPT, "steps": 5}, Idempotency_Key="once")[1])
        for _ in range(2)
    ]
    assert [body["id"] for body in bodies] == ["once", "once"]
    status, said = client.ask("/requests", method="POST", body={"prompt": PROMPT, "steps": 6}, Idempotency_Key="once")
    assert (status, json.loads(said)["detail"]) == (409, "something else was accepted under the key once: take another one")
    assert client.wait("once")["state"] == "drawn"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": PROMPT, "steps": 0}, "steps"),
    ({"prompt": PROMPT, "seed": -1}, "seed"),
    ({"prompt": PROMPT, "tolerance": 2}, "tolerance"),
    ({"prompt": PROMPT, "preset": "best"}, "preset"),
    ({"prompt": PROMPT, "stepps": 3}, "stepps"),
    ({"prompt": PROMPT, "true_cfg_scale": 0.5}, "true_cfg_scale"),
]


@pytest.mark.parametrize(("body", "name"), WRONG, ids=[name for _, name in WRONG])
def test_wrong_requests_are_refused_by_the_name_of_what_is_wrong(client: Client, body: dict[str, Any], name: str):
    status, said = client.ask("/requests", method="POST", body=body)
    assert status == 422
    assert [each["loc"][-1] for each in json.loads(said)["detail"]] == [name]


def test_a_preset_and_a_tolerance_exclude_each_other(client: Client):
    status, said = client.ask("/requests", method="POST", body={"prompt": PROMPT, "preset": "fast", "tolerance": 0.1})
    assert status == 422
    assert "exclude each other" in json.loads(said)["detail"][0]["msg"]


@pytest.mark.parametrize("text", [b'{"prompt": "a", "tolerance": NaN}', b'{"prompt": "\\ud800"}', b"{", b"[]"])
def test_what_is_no_request_is_refused(client: Client, text: bytes):
    assert client.send("/requests", text)[0] == 422


def test_names_that_are_none_are_refused(client: Client):
    assert client.ask("/requests", method="POST", body={"prompt": PROMPT}, Idempotency_Key="a/b")[0] == 422
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/image")):
        status, said = client.ask(f"/requests/nobody{path}", method=method)
        assert (status, json.loads(said)["detail"]) == (404, "request nobody is not known, or not any more")


def test_more_than_are_accepted_are_told_to_come_again(client: Client):
    names = [client.submit(prompt=PROMPT, steps=900, tolerance=0.0)["id"] for _ in range(16)]
    status, said = client.ask("/requests", method="POST", body={"prompt": PROMPT})
    for name in names:
        client.ask(f"/requests/{name}", method="DELETE")
    assert status == 503
    assert "ask again later" in json.loads(said)["detail"]
    assert client.wait(client.submit(prompt=PROMPT, steps=5)["id"])["state"] == "drawn"


def test_metrics_are_told_to_people_and_to_prometheus(client: Client):
    client.wait(client.submit(prompt=PROMPT, steps=9)["id"])
    status = json.loads(client.ask("/status")[1])
    assert status["requests"]["drawn"] >= 1
    assert status["here"]["refreshes_saved"] > 0
    families = {family.name: family for family in text_string_to_metric_families(client.ask("/metrics")[1].decode())}
    (steps,) = families["afcache_steps"].samples
    assert (steps.labels, steps.value) == ({"replica": "here"}, status["here"]["steps"])
    states = {sample.labels["state"]: sample.value for sample in families["afcache_fleet_requests"].samples}
    assert states == status["requests"]
