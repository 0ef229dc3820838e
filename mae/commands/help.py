"""The help page of a command: its usage and every key with its default and meaning."""

from collections.abc import Sequence

from mae import config
from mae.keys import FREE, SECTIONS


def page(usage: str, words: Sequence[str], protocol: str | None) -> str:
    """Usage, then all keys; the method and protocol are those that the words choose, `protocol` before them."""
    files = [w for w in words if "=" in w or w.endswith(".yaml")]
    chosen = config.load([f"configs/evaluation/{protocol}.yaml", *files] if protocol else files)
    lines = [usage.strip(), "", "Words: files (.yaml) and overrides (section.key=value), merged left to right. Keys and defaults:"]
    for section in SECTIONS:
        name = getattr(chosen, section).get("name") if section in FREE else None
        if section in FREE and name is None:
            continue
        values = chosen.as_dict()[section]
        lines.append(f"\n{section}" + (f" ({name})" if name else ""))
        for key, doc in config.docs(section, name).items():
            lines.append(f"  {section}.{key}={_show(values.get(key))}".ljust(40) + f"  {doc}")
    return "\n".join(lines)


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
