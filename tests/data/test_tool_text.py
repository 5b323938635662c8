"""One tool with every kind of parameter, written out; the random schemas of test_rendering.py are compared with the template itself."""

from gptoss_jax.data.tool_text import builtin_tools_text, functions_text

PARAMETERS = {
    "type": "object",
    "required": ["city", "route"],
    "properties": {
        "city": {"type": "string", "description": "Name of a city"},
        "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
        "days": {"type": "integer", "default": 3},
        "note": {"type": "string", "nullable": True, "default": None},
        "exact": {"type": ["boolean", "null"]},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["x"]}, "nullable": True},
        "route": {
            "type": "object",
            "properties": {"from": {"type": "number", "description": "not shown"}, "to": {"type": "array"}},
            "required": ["from"],
        },
        "long": {"type": "array", "items": {"type": "object", "properties": {f"member_{i}": {"type": "string"} for i in range(3)}}},
        "when": {"oneOf": [{"type": "string", "description": "a day"}, {"type": "integer", "default": 1}]},
        "any": {"anyOf": [{"type": "string"}]},
    },
}
TEXT = """\
# Tools

## functions

namespace functions {

// Current weather
type get_weather = (_: {
// Name of a city
city: string,
unit?: "c" | "f", // default: c,
days?: number, // default: 3,
note?: string | null, // default: null,
exact?: boolean | null,
tags?: string[] | null,
route: {
from: 
                number, to?: 
                any[]},
long?: any[],
when?: string// a day | 
number                    // default: 1,
any?: any,
}) => any;

// Nothing
type nothing = () => any;

} // namespace functions"""


def test_every_kind_of_parameter():
    weather = {"name": "get_weather", "description": "Current weather", "parameters": PARAMETERS}
    nothing = {"name": "nothing", "description": "Nothing", "parameters": {"type": "object", "properties": {}}}
    assert functions_text([{"type": "function", "function": function} for function in (weather, nothing)]) == TEXT


def test_long_elements_of_an_array_are_any():
    for length, element in ((50, "x" * 50), (51, "any")):
        parameters = {"properties": {"a": {"type": "array", "items": {"type": ["x" * length]}}}}
        function = {"name": "f", "description": "d", "parameters": parameters}
        assert f"\na?: {element}[],\n" in functions_text([{"type": "function", "function": function}])


def test_built_in_tools_stand_in_the_order_of_the_release():
    assert builtin_tools_text([]) == ""
    both = builtin_tools_text(["python", "browser"])
    assert both.startswith("# Tools\n\n## browser\n") and both.index("## browser") < both.index("## python")
