"""How valid input is damaged: bytes flipped and cut, values swapped for hostile ones; every choice is Hypothesis's."""

import copy
import json
import math
from collections.abc import Sequence
from random import Random
from typing import Any

from hypothesis import strategies as some

randoms = some.randoms(use_true_random=False)

TARGETS = [
    "os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "evil_module.run", "evil_module.Net",
    "functools.partial", "torch.load", "pickle.loads", "importlib.import_module", "shutil.rmtree", "webbrowser.open",
    "steerfm.files.os.system", "steerfm.saving.torch.load", "steerfm.building.importlib.import_module",
    "steerfm.files.write_atomic", "steerfm.runs.Run.write_text", "steerfm.provenance.subprocess.run",
    "steerfm.MLP.__init__.__globals__", "steerfm.FlowMap.load", "steerfm.flow_map.FlowMap", "steerfm.MLP",
    "steerfm.backbones.pipeline_files.library", "steerfm.cli.main", "steerfm.reward.load_reward", "steerfm",
    "steerfm.modules.RewardFineTuning.load_from_checkpoint", "torch.optim.lr_scheduler.warnings.warn",
    "torch.optim.lr_scheduler.Tensor", "torch.optim.AdamW", "lightning.Trainer", "steerfm.rewards.remote.Remote",
    "lightning.pytorch.loggers.WandbLogger", "steerfm.data.ImageFolder", "steerfm.data.Prompts", "steerfm.nothing",
    "steerfm.paths.Linear", "steerfm.conditions.CaptionWords", "", ".", "a b", "__main__.x", "steerfm..x", "é.ü",
]  # fmt: skip
TEXTS = [
    "", " ", "\0", "\x1b[2J", "\u202eabc", "e\u0301", "\U0001f600", "x" * 3000, "../../x", "/etc/passwd", "~/x", "..",
    "file:///etc/passwd", "http://localhost:1/x", "${oc.env:HOME}", "${oc.decode:'[1]'}", "${seed}", "${x.y}", "${",
    "${oc.create:{_target_:os.system}}", "${zoo:../x}", "???", "nan", "1e999", "null", "a\nb", "a\tb", "{{7*7}}", "%s",
    "<script>alert(1)</script>", "images/../../x", "C:\\x", "=1+1", "module:function", "--trust", "*",
    "a" + "\u0301" * 50,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 7, 255, 2**15, 2**31, 2**63, 2**64, 2**80, -(2**63), 10**300, 0.0, -0.0, 0.5, -2.5, 1e-320, 1e308,
    -1e308, math.nan, math.inf, -math.inf, 10**400, True, False, None,
]  # fmt: skip
KEYS = [
    "_target_", "_partial_", "_args_", "_recursive_", "_convert_", "trusted", "__class__", "__init__", "defaults",
    "hydra", "x", "", "a.b", "path", "network", "self", "cls", "\0", "format",
]  # fmt: skip


def hostile(random: Random) -> Any:
    """Return a value that has no business anywhere."""
    kind = random.randrange(8)
    if kind < 2:
        return random.choice(TEXTS)
    if kind < 4:
        return random.choice(NUMBERS)
    target = {"_target_": random.choice(TARGETS)}
    if kind == 4:
        return target
    if kind == 5:
        return {**target, random.choice(KEYS): hostile(random)}
    if kind == 6:
        return [hostile(random) for _ in range(random.randrange(4))]
    deep: Any = hostile(random)
    for _ in range(random.choice([1, 3, 30, 120])):
        deep = [deep] if random.randrange(2) else {random.choice(KEYS): deep}
    return deep


def damaged(random: Random, value: Any, most: int = 3) -> Any:
    """Return a copy of nested data with up to `most` places swapped, left out, renamed, wrapped or added."""
    whole = {"": copy.deepcopy(value)}
    for _ in range(random.randint(1, most)):
        place, key = random.choice(_places(whole))
        kind = random.randrange(6)
        if kind <= 2:
            place[key] = hostile(random)
        elif kind == 3 and place is not whole:
            del place[key]
        elif kind == 4:
            place[key] = [place[key]] if random.randrange(2) else {random.choice(KEYS): place[key]}
        elif isinstance(place[key], dict):
            place[key][random.choice(KEYS)] = hostile(random)
        else:
            place[key] = str(place[key])
    return whole[""]


def _places(whole: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return every (container, key) in nested data."""
    found: list[tuple[Any, Any]] = []
    left: list[Any] = [whole]
    while left and len(found) < 10_000:
        node = left.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                left.append(node[key])
    return found


def damaged_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """Return bytes with up to `most` changes: flipped, cut, doubled, overwritten by others or by a huge length."""
    changed = bytearray(data)
    for _ in range(random.randint(1, most)):
        place = random.randint(0, len(changed))
        kind = random.randrange(7)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + random.choice([1, 2, 8, 100])]
        elif kind == 3:
            changed[place:place] = random.randbytes(random.choice([1, 4, 50]))
        elif kind == 4:
            changed[place:place] = changed[place : place + 100]
        elif kind == 5:
            changed[place : place + 8] = (2 ** random.choice([31, 32, 60, 63])).to_bytes(8, "little")
        else:
            changed[place : place + 1] = random.choice(
                [b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"{", b"["]
            )
    return bytes(changed)


def damaged_json(random: Random, value: Any) -> bytes:
    """Return JSON of data that was damaged, or whose text was."""
    if random.randrange(4):
        text = json.dumps(damaged(random, value), ensure_ascii=bool(random.randrange(2)))
        return text.encode("utf-8", "surrogatepass")
    return damaged_bytes(random, json.dumps(value).encode())


def garbage(random: Random, starts: Sequence[bytes] = ()) -> bytes:
    """Return bytes of no meaning, behind a start that looks like something."""
    start = random.choice(
        [b"", *starts, b"\x80\x02c", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe", b"<svg", b"\x1f\x8b"]
    )
    return start + random.randbytes(random.choice([0, 1, 10, 200]))
