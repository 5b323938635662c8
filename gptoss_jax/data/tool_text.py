"""What the model is told about its tools: function signatures in the TypeScript-like form of the release, and the texts of its built-in tools.

    namespace functions {

    // Current weather                        description of the function; obligatory
    type get_weather = (_: {
    // Name of a city                         description of a parameter
    city: string,
    unit?: "c" | "f", // default: c           `?` where it is not in "required"
    }) => any;

    } // namespace functions

The form follows the release's chat template to the last blank, its oddities included, because that is the text which the model gets when it is used:
descriptions inside nested objects are not shown, a list of types is shown with JSON's names (`integer | null`), `nullable` counts for
strings and arrays only, `anyOf`, `$ref` and everything unknown are `any`, and a type is `any[]` once its element takes more than 50 characters.
Where the template fails (no description, a default of an enum that is no string), the schema is refused here with the place named.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_ELEMENT = 50  # characters of an array's element type
SIMPLE_TYPES = {"number": "number", "integer": "number", "boolean": "boolean"}

BROWSER = """\
## browser

// Tool for browsing.
// The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
// Cite information from the tool using the following format:
// `【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
// Do not quote more than 10 words directly from the tool output.
// sources=web (default: web)
namespace browser {

// Searches for information related to `query` and displays `topn` results.
type search = (_: {
query: string,
topn?: number, // default: 10
source?: string,
}) => any;

// Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.
// Valid link ids are displayed with the formatting: `【{id}†.*】`.
// If `cursor` is not provided, the most recent page is implied.
// If `id` is a string, it is treated as a fully qualified URL associated with `source`.
// If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on the most relevant passage, if available.
// Use this function without `id` to scroll to a new location of an opened page.
type open = (_: {
id?: number | string, // default: -1
cursor?: number, // default: -1
loc?: number, // default: -1
num_lines?: number, // default: -1
view_source?: boolean, // default: false
source?: string,
}) => any;

// Finds exact matches of `pattern` in the current page, or the page given by `cursor`.
type find = (_: {
pattern: string,
cursor?: number, // default: -1
}) => any;

} // namespace browser

"""
PYTHON = (
    "## python\n\nUse this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool should be used "
    "for internal reasoning, but not for code that is intended to be visible to the user (e.g. when creating plots, tables, or files).\n\n"
    "When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook environment. python will respond "
    "with the output of the execution or time out after 120.0 seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet "
    "access for this session is UNKNOWN. Depends on the cluster.\n\n"
)
BUILTIN_TOOLS = {"browser": BROWSER, "python": PYTHON}  # in the order of the system message


def to_json(value: Any) -> str:
    """JSON as the chat template writes it: a blank after commas and colons, nothing but control characters and quotes escaped."""
    return json.dumps(value, ensure_ascii=False)


def builtin_tools_text(names: Sequence[str]) -> str:
    """The tools part of a system message; empty without tools. Names: keys of `BUILTIN_TOOLS`."""
    return "# Tools\n\n" + "".join(text for name, text in BUILTIN_TOOLS.items() if name in names) if names else ""


def functions_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools part of a developer message. `tools` are `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises ValueError, naming the place, for schemas that the release's template cannot write.
    """
    lines = ["# Tools\n\n## functions\n\nnamespace functions {\n\n"]
    for i, tool in enumerate(tools):
        function, where = tool["function"], f"tools[{i}].function"
        lines.append(f"// {_string(function, 'description', where)}\ntype {_string(function, 'name', where)} = ")
        parameters = _object(function.get("parameters") or {}, f"{where}.parameters")
        properties = _object(parameters.get("properties") or {}, f"{where}.parameters.properties")
        if not properties:
            lines.append("() => any;\n\n")
            continue
        required = _list(parameters, "required", f"{where}.parameters")
        lines.append("(_: {\n")
        lines += [_parameter(name, spec, name in required, f"{where}.parameters.properties.{name}") for name, spec in properties.items()]
        lines.append("}) => any;\n\n")
    return "".join(lines) + "} // namespace functions"


def _parameter(name: str, spec: Any, required: bool, where: str) -> str:
    spec = spec if isinstance(spec, Mapping) else {}
    text = f"// {_string(spec, 'description', where)}\n" if spec.get("description") else ""
    text += f"{name}{'' if required else '?'}: {_type(spec, where)}"
    if "default" in spec:
        if spec.get("enum"):
            text += f", // default: {_string(spec, 'default', where)}"
        elif spec.get("oneOf"):
            text += f"// default: {_string(spec, 'default', where)}"
        else:
            text += f", // default: {to_json(spec['default'])}"
    return text + ",\n"


def _type(spec: Any, where: str) -> str:
    """The type of a JSON schema, in the order in which the template looks at its keywords."""
    spec = spec if isinstance(spec, Mapping) else {}
    kind = spec.get("type")
    null = " | null" if spec.get("nullable") else ""
    if kind == "array":
        items = spec.get("items")
        of = items.get("type") if isinstance(items, Mapping) else None
        simple = isinstance(of, str) and of in ("string", *SIMPLE_TYPES)  # then nothing else of the element is shown, an enum neither
        element = SIMPLE_TYPES.get(of, of) if simple else _type(items, f"{where}.items")
        return ("any" if element == "object | object" or len(element) > LONGEST_ELEMENT else element) + "[]" + null
    if isinstance(kind, list) and kind:
        return " | ".join(str(name) for name in kind)
    if spec.get("oneOf"):
        return _one_of(_list(spec, "oneOf", where), f"{where}.oneOf")
    if kind == "string":
        return " | ".join(f'"{value}"' for value in _list(spec, "enum", where)) or "string" + null
    if kind == "object":
        properties = _object(spec.get("properties") or {}, f"{where}.properties")
        required = _list(spec, "required", where)
        members = [f"{name}{'' if name in required else '?'}: \n{' ' * 16}{_type(of, f'{where}.{name}')}" for name, of in properties.items()]
        return "{\n" + ", ".join(members) + "}" if members else "object"
    return SIMPLE_TYPES.get(kind, "any") if isinstance(kind, str) else "any"


def _one_of(variants: Sequence[Any], where: str) -> str:
    out = []
    for i, variant in enumerate(variants):
        text = _type(variant, f"{where}[{i}]")
        if isinstance(variant, Mapping):
            text += f"// {_string(variant, 'description', f'{where}[{i}]')}" if variant.get("description") else ""
            text += f"{' ' * 20}// default: {to_json(variant['default'])}" if "default" in variant else ""
        out.append(text)
    return " | \n".join(out)


def _string(of: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(of.get(key), str):
        problem = f"is {to_json(of[key])}, it must be a string" if key in of else "is missing"
        raise ValueError(f"{where}.{key} {problem}: the release's chat template cannot write this tool")
    return of[key]


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is of type {type(value).__name__}, it must be an object")
    return value


def _list(schema: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    value = schema.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{where}.{key} is of type {type(value).__name__}, it must be a list")
    return value
