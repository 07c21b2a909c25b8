"""
Overrides a script's defaults from config files and --key=value flags, and refuses whatever it does not know.

$ python train.py config/gpt2.py --batch_size=32 --compile=false
$ python train.py --help

The keys are the public int, float, bool and str names that a script has set above its call of configure(globals()).
A config file is plain Python: it sees the current values, those of the flags too (max_iters = 2 * warmup_iters), builds
on another file with include('gpt2.py'), and may import modules; its own helpers are named _like_this. Later files win
over earlier ones, and flags over all files. --dry-run is short for --dry_run=true.
"""
import os
import re
import sys
import traceback
from difflib import get_close_matches
from types import ModuleType

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SCALARS = (int, float, bool, str)
LARGEST = 2 ** 63 # what torch and numpy count with lies below it, and every int up to it is a float too
_REFUSAL = "this configuration cannot run"


def fail(violations):
    """
    Raise SystemExit with one message that lists all violations, strings that get a line each, or return if there are
    none.
    """
    if violations:
        lines = ["  - " + " ".join(violation.splitlines()) for violation in violations]
        raise SystemExit("\n".join([f"{_REFUSAL}, {len(violations)} to fix:", *lines]))


def is_refusal(text):
    """Whether a text, such as a run's error.txt, has the message of fail() in it."""
    return _REFUSAL in text


def configure(namespace, argv=None, base=None, base_name="base", problems=None):
    """
    Resolve defaults < base < config files < flags, and write the values into namespace, the globals() of a script.

        argv       the arguments, by default sys.argv[1:]
        base       {key: value} of an earlier run that is to be resumed; base_name says where it came from
        problems   a list that takes the violations, for a script that adds its own and then calls fail(problems)

    Returns (config, sources), two dicts by key: the value, and "default", base_name, a file's path or "command line".
    Raises SystemExit: 0 after --help, else one message with every violation, unless problems is given.
    """
    argv = sys.argv[1:] if argv is None else argv
    # a second call, with the base of the run that the first one asks to resume, must start from the same defaults
    current = {key: value for key, value in namespace.items() if key[0] != "_" and type(value) in SCALARS}
    defaults = namespace.setdefault("_defaults", current)
    if "-h" in argv or "--help" in argv:
        print_help(namespace, defaults)
        raise SystemExit(0)
    config, sources = dict(defaults), dict.fromkeys(defaults, "default")
    violations = [] if problems is None else problems

    def override(key, value, source):
        """Take over a value, or add a violation. Returns the value that the key has now."""
        if key not in config:
            violation = f"{source}: unknown key {key!r}"
            close = get_close_matches(key, config, n=1)
            if close:
                violation += f", did you mean {close[0]!r}?"
            if type(value) not in SCALARS:
                violation += " (a config file's own helpers are named _like_this)"
            violations.append(violation)
            return value
        try:
            value = convert(value, type(defaults[key]))
        except TypeError as e:
            violations.append(f"{source}: {key} wants {e}, got {value!r}")
            return config[key]
        if source == "command line" or sources[key] != "command line": # a file cannot change what a flag has set
            config[key], sources[key] = value, source
        return config[key]

    class Scope(dict):
        """A config file's namespace, which hears of each name as the file sets it."""

        def __setitem__(self, key, value):
            public = not key.startswith("_") and not isinstance(value, ModuleType)
            super().__setitem__(key, override(key, value, self["__file__"]) if public else value)

    running = [] # the config files that are being run, each included by the one before it

    def run(path):
        """Run one config file."""
        path = find(path)
        if not os.path.isfile(path):
            hint = f", write --{path} for a flag" if "=" in path else ""
            violations.append(f"{path}: no such config file{hint}")
            return
        if os.path.realpath(path) in running: # where it does so twice it would never end
            violations.append(f"{path} includes itself")
            return
        scope = Scope(config, __file__=path)

        def include(name):
            """Run another file, whose name is relative to this one."""
            run(os.path.normpath(os.path.join(os.path.dirname(path), name)))
            scope.update(config) # dict.update does not call __setitem__: what was included keeps its own source
        scope.update(include=include)
        running.append(os.path.realpath(path))
        try:
            with open(path, encoding="utf-8") as f:
                exec(compile(f.read(), path, "exec"), scope)
        except (Exception, SystemExit) as e: # whatever a file may raise belongs to the same report
            lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
            where = f" (line {lines[-1]})" if lines else ""
            violations.append(f"{path}: {type(e).__name__}: {e}{where}")
        running.pop()

    for arg in argv:
        key, equals, text = arg.lstrip("-").partition("=")
        key = key.replace("-", "_")
        kind = type(defaults.get(key))
        if arg.startswith("--") and (equals or kind is bool):
            value = text if kind is str else number(text)
            override(key, value if equals else True, "command line")
        elif arg.startswith("--") and key not in config and (close := get_close_matches(key, config, n=1)):
            flag = close[0].replace("_", "-") if type(defaults[close[0]]) is bool else f"{close[0]}=value"
            violations.append(f"command line: unknown flag {arg!r}, did you mean --{flag}?")
        elif arg.startswith("-"):
            violations.append(f"command line: write --{key}={text or 'value'}, got {arg!r}")
    for key, value in (base or {}).items():
        override(key, value, base_name)
    for arg in argv:
        if not arg.startswith("-"):
            run(arg)
    namespace.update(config)
    if problems is None:
        fail(violations)
    return config, sources


def find(path):
    """Return where a config file is: config/... that is not in this folder may lie beside the scripts."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    of_the_scripts = os.path.dirname(os.path.normpath(path)) == "config" and os.path.isfile(beside)
    return beside if of_the_scripts and not os.path.exists(path) else path


def convert(value, kind):
    """
    Return value as an int, float, bool or str where that loses nothing: 0 -> 0.0, 1e5 -> 100000, yes -> True.
    Raises TypeError where it does, and for integers from 2^63 on.
    """
    if kind is bool and str(value).lower() in BOOLS:
        return BOOLS[str(value).lower()]
    if kind is str and type(value) in SCALARS:
        return str(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind in (int, float) and type(value) is int and abs(value) >= LARGEST:
        raise TypeError("a number below 2^63")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError({int: "an int", float: "a float", bool: "true or false", str: "a string"}[kind])
    return value


def number(text):
    """Return text as an int or a float if it reads as one, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def print_help(namespace, defaults):
    """
    Print a script's docstring and its defaults as they are written there: from the first one, with the comment above
    it, to before the rule that ends them, or to the call of configure.
    """
    with open(namespace["__file__"], encoding="utf-8") as f:
        source = f.read()
    first = re.search(rf"(^#.*\n)*^({'|'.join(defaults)})\s*[:=]", source, re.MULTILINE)
    end = re.compile(r"^# -----|^.*configure\(globals\(\)", re.MULTILINE).search(source, first.end())
    print((namespace["__doc__"] or "").strip())
    print()
    print(source[first.start():end.start()].rstrip())
