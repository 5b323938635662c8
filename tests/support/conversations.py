"""Random conversations in the `messages` form: every kind of message, tool loops, thoughts here and there, nested schemas, awkward text."""

import random

from gptoss_jax.data.messages import check_row

TEXTS = ("Hi", "line\nbreak", "  spaces  ", "Grüße \U0001f408", 'quote " back\\slash', "<|end|><|start|>assistant", "1234 56", "a\tb", "日本語", "{}")
WORDS = ("city", "unit", "n", "Größe", "deep_value")
SIMPLE = ("string", "number", "integer", "boolean")


def text(rng: random.Random) -> str:
    """No two are the same: a number of nine digits stands in each."""
    return f"{rng.choice(TEXTS)}{rng.randrange(10**8, 10**9)}{rng.choice(TEXTS)}"


def value(rng: random.Random, depth: int = 2):
    kinds = [text(rng), rng.randint(-9, 999), 0.5, True, None]
    if depth:
        kinds += [[value(rng, depth - 1) for _ in range(rng.randint(0, 2))], {word: value(rng, depth - 1) for word in rng.sample(WORDS, 2)}]
    return rng.choice(kinds)


def schema(rng: random.Random, depth: int = 3) -> dict:
    kind = rng.choice(["simple"] * 3 + ["enum", "array", "types", "oneOf", "object", "unknown"] if depth else ["simple", "enum", "bare"])
    spec: dict = {}
    if kind == "simple":
        spec = {"type": rng.choice(SIMPLE)}
    elif kind == "enum":
        spec = {"type": rng.choice(["string", "integer"]), "enum": rng.sample(["c", "f", "k", "5"], 2)}
    elif kind == "array":
        spec = {"type": "array", "items": rng.choice([schema(rng, depth - 1), {"type": rng.choice(SIMPLE), "enum": ["a"]}, {}, True])}
        if rng.random() < 0.2:
            del spec["items"]
    elif kind == "types":
        spec = {"type": rng.choice([["string", "null"], ["integer"], ["object", "object"], []])}
    elif kind == "oneOf":
        spec = {"oneOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    elif kind == "object":
        spec = parameters(rng, depth - 1)
    elif kind == "unknown":
        spec = rng.choice([{"anyOf": [{"type": "string"}, {"type": "null"}]}, {"$ref": "#/x"}, {"type": "null"}, {}])
    if rng.random() < 0.3:
        spec["nullable"] = rng.choice([True, False])
    if rng.random() < 0.4:
        spec["description"] = text(rng)
    if rng.random() < 0.4:
        spec["default"] = text(rng) if "enum" in spec or "oneOf" in spec else value(rng)
    return spec


def parameters(rng: random.Random, depth: int = 3) -> dict:
    names = rng.sample(WORDS, rng.randint(0, 3))
    spec = {"type": "object", "properties": {name: schema(rng, depth) for name in names}}
    if rng.random() < 0.8:
        spec["required"] = names[: rng.randint(0, len(names))]
    return spec


def tools(rng: random.Random, depth: int = 3) -> list[dict]:
    functions = [{"name": f"tool_{i}", "description": text(rng), "parameters": parameters(rng, depth)} for i in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        del functions[0]["parameters"]
    return [{"type": "function", "function": function} for function in functions]


def conversation(rng: random.Random, *, longest: int = 10, preambles: bool = False, weights: bool = False) -> dict:
    """A row that passed `check_row`. Odd orders are included: answers without a question, calls without a result, two questions in a row.

    `weights`: a third of the assistant's messages are context only.
    """
    row: dict = {"tools": tools(rng)} if rng.random() < 0.6 else {}
    if rng.random() < 0.3:
        row["reasoning_effort"] = rng.choice(["low", "medium", "high"])
    messages = [{"role": rng.choice(["system", "developer"]), "content": rng.choice([text(rng), ""])}] if rng.random() < 0.5 else []
    called = False
    for _ in range(rng.randint(1, longest)):
        kind = rng.choice(["user", "final", "call"] + ["tool"] * 2 * called + ["preamble"] * preambles)
        message = {"role": "assistant", **({"thinking": text(rng)} if rng.random() < 0.5 else {})}
        if kind == "user":
            message = {"role": "user", "content": text(rng)}
        elif kind == "tool":
            message = {"role": "tool", "content": value(rng) if rng.random() < 0.5 else text(rng)}
            message["content"] = "" if message["content"] is None else message["content"]
        elif kind == "call":
            call = {"name": f"tool_{rng.randint(0, 2)}", "arguments": {word: value(rng) for word in rng.sample(WORDS, rng.randint(0, 2))}}
            if rng.random() < 0.3:
                call["content_type"] = rng.choice(["json", "<|constrain|>json"])
            message["tool_calls"] = [{"type": "function", "function": call}]
            if "thinking" not in message:
                message["content"] = rng.choice(["", text(rng)])
            called = True
        else:
            message["content"] = text(rng)
            if kind == "preamble":
                message["channel"] = "commentary"
            else:
                called = False
        messages.append(message)
    if messages[-1]["role"] != "assistant" or messages[-1].get("channel"):
        messages.append({"role": "assistant", "content": text(rng), **({"thinking": text(rng)} if rng.random() < 0.5 else {})})
    for message in messages:
        if weights and message["role"] == "assistant":
            message["weight"] = rng.choice([0, 1, 1])
    return check_row({**row, "messages": messages})
