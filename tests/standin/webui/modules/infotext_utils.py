"""The last line of an image's parameters."""

import json
import re


def write(params):
    def shown(value):
        return json.dumps(value, ensure_ascii=False) if set(str(value)) & set(",:\n") else str(value)

    return ", ".join(f"{name}: {shown(value)}" for name, value in params.items())


def read(line):
    found, rest = {}, line
    while rest:
        name, _, rest = rest.lstrip().partition(":")
        rest = rest.lstrip()
        if match := re.match(r'("(?:\\.|[^"\\])+")(?:,|$)', rest):
            text, rest = json.loads(match[1]), rest[match.end() :]
        else:
            text, _, rest = rest.partition(",")
        size = re.match(r"^(\d+)x(\d+)$", text)
        found.update({f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: text})
    return found
