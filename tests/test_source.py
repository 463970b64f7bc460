"""How the scripts are laid out: a reader may trust the banner, and the docstring's lists.

Everything above BANNER is what an auditor has to read; below it, everything only calls what is
above. Sections whose banner begins "# --- pure" take data and return data. The rules read the
source and run nothing of it; they know names, not types, so a method counts as each method of
that name in the script.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import subprocess
import unittest
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAST = True

BANNER = "# --- you may stop here: what follows only calls what is above ---"
GENERATED = "# BEGIN GENERATED"
SECTION = re.compile(r"# --- (.*) ---")
PARAGRAPHS = ("Starts", "Reads", "Writes", "Reaches")

# Lines: of the whole file, without the copy of lima/, and of what stands above the banner.
BUDGETS = {
    "agent_vm.py": (3202, 1619),
    "github_mcp_proxy.py": (2940, 1600),
    "github_app_token.py": (1555, 1005),
    "lima/egress.py": (796, 250),
}
README_BUDGET = 200
LIMA_BUDGET = 824  # without the two scripts that have a budget of their own
QEMU_BUDGET = 120

# What starts a program. One function of a script may name any of these: the door.
PROGRAMS = set(
    """
    subprocess.Popen subprocess.run subprocess.call subprocess.check_call subprocess.check_output
    subprocess.getoutput subprocess.getstatusoutput
    asyncio.create_subprocess_exec asyncio.create_subprocess_shell
    os.system os.popen os.fork os.forkpty os.posix_spawn os.posix_spawnp pty.spawn pty.fork
    os.execl os.execle os.execlp os.execlpe os.execv os.execve os.execvp os.execvpe
    os.spawnl os.spawnle os.spawnlp os.spawnlpe os.spawnv os.spawnve os.spawnvp os.spawnvpe
    """.split()
)
# What opens a socket; of the modules, every function but for those in PURE.
SOCKET_MODULES = ("socket", "http.client", "http.server", "socketserver", "urllib.request")
SOCKETS = set(
    """
    asyncio.open_connection asyncio.open_unix_connection
    asyncio.start_server asyncio.start_unix_server
    http.client.HTTPConnection http.client.HTTPSConnection
    http.server.HTTPServer http.server.ThreadingHTTPServer
    """.split()
)
OPEN_NOTHING = set(
    """
    urllib.request.getproxies urllib.request.proxy_bypass
    urllib.request.getproxies_environment urllib.request.proxy_bypass_environment
    """.split()
)
SOCKET_METHODS = set(
    """
    create_server create_unix_server create_connection create_unix_connection
    create_datagram_endpoint
    """.split()
)
# What writes to the disk, whatever its arguments are; `open` and its like depend on the mode.
WRITES = set(
    """
    os.replace os.rename os.renames os.remove os.unlink os.mkdir os.makedirs os.rmdir
    os.removedirs os.link os.symlink os.chmod os.fchmod os.chown os.fchown os.lchown
    os.truncate os.ftruncate os.utime os.mkfifo os.mknod os.setxattr os.removexattr
    shutil.copy shutil.copy2 shutil.copyfile shutil.copyfileobj shutil.copymode shutil.copystat
    shutil.copytree shutil.move shutil.rmtree shutil.chown shutil.make_archive
    shutil.unpack_archive
    tempfile.mkstemp tempfile.mkdtemp tempfile.TemporaryFile tempfile.NamedTemporaryFile
    tempfile.TemporaryDirectory tempfile.SpooledTemporaryFile
    """.split()
)
WRITE_METHODS = set(
    """
    write_text write_bytes touch mkdir rmdir unlink chmod lchmod symlink_to hardlink_to link_to
    """.split()
)
ONE_ARGUMENT = {"rename", "replace"}  # Path's; with two arguments it is str.replace or another
OPENERS = {"open", "io.open", "os.open"}  # os.fdopen opens nothing: it wraps what is open
WRITING_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC", "O_TMPFILE"}

# What a pure section may not touch: the functions of these modules, and what is above.
WORLD_MODULES = SOCKET_MODULES + tuple(
    """
    os time subprocess asyncio shutil tempfile logging signal select selectors fcntl termios tty
    pty pwd grp getpass platform threading multiprocessing secrets random glob mmap webbrowser
    """.split()
)
WORLD = set(
    """
    open print input breakpoint io.open ssl.create_default_context ssl.SSLContext
    sys.stdin sys.stdout sys.stderr sys.argv sys.exit sys.path
    datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today datetime.date.today
    pathlib.Path.cwd pathlib.Path.home uuid.uuid1 uuid.uuid4 locale.setlocale locale.getlocale
    threading.Thread threading.Timer
    """.split()
)
READ_METHODS = set(
    """
    read_text read_bytes open exists is_file is_dir is_symlink is_mount is_socket is_fifo
    stat lstat iterdir glob rglob resolve expanduser readlink samefile absolute
    sendall sendto recv recv_into recvfrom accept drain
    """.split()
)
# Functions of those modules that look at nothing but their arguments; and exceptions.
PURE = set(
    """
    os.path.basename os.path.dirname os.path.join os.path.normpath os.path.isabs os.path.split
    os.path.splitext os.path.commonpath os.path.commonprefix os.path.sep
    os.fsencode os.fsdecode os.fspath os.sep os.linesep os.pathsep os.devnull os.path os.error
    socket.timeout socket.gaierror socket.herror socket.error socket.inet_pton socket.inet_ntop
    asyncio.iscoroutinefunction secrets.compare_digest http.client.responses
    socket.inet_aton socket.inet_ntoa
    """.split()
)
# A method of such a name is, as a rule, that of a dict, a list, a string …
COMMON_METHODS = {
    name for kind in (dict, list, set, str, bytes, bytearray, tuple, int) for name in dir(kind)
} | set(dir(re.Pattern))
MATCH_METHODS = set(dir(re.Match))  # without an argument: start() is a match's, start(argv) ours

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Reference:
    """A name that is read, with its dots: imported names in full, `?.name` for what is unknown."""

    name: str
    line: int
    call: ast.Call | None

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Unit:
    """A function, a method, or what a class or the module does beside its functions."""

    name: str
    line: int
    owner: str  # the class of a method
    references: tuple[Reference, ...]
    is_property: bool = False


class Source:
    """One script, read."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.lines = text.splitlines()
        self.tree = ast.parse(text)

    def at(self, line: int, words: str) -> str:
        return f"{self.name}:{line}: {words}"

    # Where things stand

    @cached_property
    def end(self) -> int:
        """The last line before the generated copy."""
        for number, line in enumerate(self.lines):
            if line.startswith(GENERATED):
                return number
        return len(self.lines)

    @cached_property
    def banners(self) -> list[int]:
        own = self.lines[: self.end]  # the copy has files with a banner of their own
        return [number for number, line in enumerate(own, 1) if line == BANNER]

    @cached_property
    def banner(self) -> int:
        """The banner's line; without one, everything is above it."""
        return self.banners[0] if self.banners else self.end

    @cached_property
    def pure_lines(self) -> set[int]:
        lines: set[int] = set()
        pure = False
        for number, line in enumerate(self.lines, 1):
            section = SECTION.fullmatch(line)
            if section:
                pure = section[1].startswith("pure")
            if pure:
                lines.add(number)
        return lines

    # What is defined

    @cached_property
    def statements(self) -> list[ast.stmt]:
        """The module's own, also those under an `if`, a `try` or a `with`, without the copy."""
        found: list[ast.stmt] = []
        waiting: list[ast.AST] = list(self.tree.body)
        while waiting:
            node = waiting.pop(0)
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                waiting = [*ast.iter_child_nodes(node), *waiting]
            if isinstance(node, ast.stmt) and node.lineno <= self.end:
                found.append(node)
        return found

    @cached_property
    def functions(self) -> dict[str, int]:
        return {node.name: node.lineno for node in self.statements if isinstance(node, Function)}

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.statements if isinstance(node, ast.ClassDef)}

    @cached_property
    def definitions(self) -> dict[str, int]:
        """Functions and classes, with their lines."""
        return {**self.functions, **{name: node.lineno for name, node in self.classes.items()}}

    @cached_property
    def variables(self) -> dict[str, int]:
        """The module's variables, with the line of their first value."""
        found: dict[str, int] = {}
        for statement in self.statements:
            targets: list[ast.expr] = []
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
                targets = [statement.target]
            for target in targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        found.setdefault(node.id, node.lineno)
        return found

    @cached_property
    def imports(self) -> dict[str, str]:
        """Local name -> the full name of what is imported, wherever in the file."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    found[alias.asname or name] = name
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        return found

    @cached_property
    def modules(self) -> set[str]:
        return {name.partition(".")[0] for name in self.imports.values()}

    # What is used

    @cached_property
    def units(self) -> list[Unit]:
        found: list[Unit] = []
        for node in self.statements:
            if isinstance(node, Function):
                found.append(self.unit(node.name, node))
            elif isinstance(node, ast.ClassDef):
                rest: list[ast.AST] = [*node.decorator_list, *node.bases]
                for part in node.body:
                    if isinstance(part, Function):
                        found.append(self.unit(f"{node.name}.{part.name}", part, node.name))
                    else:
                        rest.append(part)
                for part_of_rest in rest:
                    found.append(self.unit(node.name, part_of_rest))
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                # Its statements stand in the list themselves.
                heads = [node.test] if isinstance(node, ast.If) else []
                if isinstance(node, ast.With):
                    heads = [item.context_expr for item in node.items]
                found += [self.unit("the module", head) for head in heads]
            else:
                found.append(self.unit("the module", node))
        return found

    def unit(self, name: str, node: ast.AST, owner: str = "") -> Unit:
        decorators = getattr(node, "decorator_list", [])
        is_property = any("property" in ast.dump(decorator) for decorator in decorators)
        line = getattr(node, "lineno", 0)
        return Unit(name, line, owner, tuple(self.references(node)), is_property)

    def references(self, node: ast.AST, call: ast.Call | None = None) -> Iterator[Reference]:
        """The names that are read in `node`, but for annotations, which nothing evaluates."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            if isinstance(node.ctx, ast.Load):
                yield Reference(self.full_name(node), node.lineno, call)
            base = node
            while isinstance(base, ast.Attribute) and isinstance(base.value, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Attribute) and not isinstance(base.value, ast.Name):
                yield from self.references(base.value)
            elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                yield from self.references(node.value)
            return
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    called = node if isinstance(node, ast.Call) and field == "func" else None
                    yield from self.references(child, called)

    def full_name(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.full_name(node.value)}.{node.attr}"
        return "?"

    @cached_property
    def methods(self) -> dict[str, list[Unit]]:
        found: dict[str, list[Unit]] = {}
        for unit in self.units:
            if unit.owner:
                found.setdefault(unit.name.partition(".")[2], []).append(unit)
        return found

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    # What a reference does

    def starts_program(self, reference: Reference) -> bool:
        return reference.name in PROGRAMS

    def opens_socket(self, reference: Reference) -> bool:
        if reference.name in OPEN_NOTHING:
            return False
        if reference.name in SOCKETS:
            return True
        if self.is_of(reference, SOCKET_MODULES):
            return acts(reference)
        return self.calls_method(reference, SOCKET_METHODS)

    def writes_file(self, reference: Reference) -> bool:
        if reference.name in WRITES or self.calls_method(reference, WRITE_METHODS):
            return True
        call = reference.call
        if call is None:
            return False
        if self.calls_method(reference, ONE_ARGUMENT):
            return len(call.args) == 1 and not call.keywords
        if reference.name in OPENERS:
            if call.args and self.full_name(call.args[0]) == "os.devnull":
                return False  # what is written there is written nowhere
            return opens_for_writing(call.args[1:], call.keywords)
        if self.calls_method(reference, {"open"}):
            return opens_for_writing(call.args, call.keywords)
        return False

    @cached_property
    def world_variables(self) -> set[str]:
        """Of the module, with a value from the world: a logger, a stream, what was set outside."""
        found: set[str] = set()
        for node in self.statements:
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
                continue
            if any(self.is_of_the_world(one) for one in self.references(node.value)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
        return found

    def touches_world(self, reference: Reference) -> bool:
        first = reference.name.partition(".")[0]
        return first in self.world_variables or self.is_of_the_world(reference)

    def is_of_the_world(self, reference: Reference) -> bool:
        name = reference.name
        if name in WORLD or self.is_of(reference, ("sys.stdin", "sys.stdout", "sys.stderr")):
            return name not in self.definitions
        if name in PROGRAMS | SOCKETS | WRITES:
            return True
        if self.is_of(reference, WORLD_MODULES):
            return acts(reference)
        if self.writes_file(reference) or self.opens_socket(reference):
            return True
        return self.calls_method(reference, READ_METHODS)

    def calls_method(self, reference: Reference, names: Iterable[str]) -> bool:
        """Whether it calls a method of such a name that no class of this script defines."""
        if reference.call is None or "." not in reference.name or reference.last not in names:
            return False
        is_path = reference.name.startswith("pathlib.")
        is_module = reference.name.partition(".")[0] in self.modules
        return (is_path or not is_module) and reference.last not in self.methods

    def is_of(self, reference: Reference, modules: Iterable[str]) -> bool:
        """Whether it is of one of the modules, and no variable of that name."""
        imported = reference.name.partition(".")[0] in self.modules
        return imported and any(reference.name.startswith(f"{module}.") for module in modules)

    # What reaches what

    def callees(self, unit: Unit) -> Iterator[tuple[Unit, Reference]]:
        for reference in unit.references:
            first, _, rest = reference.name.partition(".")
            own = f"{unit.owner}.{rest}"
            if reference.name in self.functions:
                yield self.by_name[reference.name], reference
            elif reference.name in self.classes and reference.call:
                for method in ("__new__", "__init__", "__post_init__", "__enter__", "__exit__"):
                    if f"{first}.{method}" in self.by_name:
                        yield self.by_name[f"{first}.{method}"], reference
            elif first in ("self", "cls") and own in self.by_name:
                yield self.by_name[own], reference
            elif f"{first}.{rest}" in self.by_name:
                yield self.by_name[f"{first}.{rest}"], reference
            elif rest and first not in self.modules:
                for method_unit in self.methods.get(reference.last, ()):
                    if self.may_be_ours(reference, method_unit):
                        yield method_unit, reference

    def may_be_ours(self, reference: Reference, method: Unit) -> bool:
        """Whether a call of such a method, of an unknown object, is taken for a call of it."""
        if method.is_property:
            return True
        if reference.call is None or reference.last in COMMON_METHODS:
            return False
        return bool(reference.call.args) or reference.last not in MATCH_METHODS

    def way_to_the_world(self, unit: Unit) -> list[str]:
        """Names from `unit` to what touches the world, e.g. [trim, read, open]; [] if none."""
        seen = {unit.name}
        waiting = [(unit, [unit.name])]
        while waiting:
            current, way = waiting.pop(0)
            for reference in current.references:
                if self.touches_world(reference):
                    return [*way, reference.name]
            for callee, _ in self.callees(current):
                if callee.name not in seen:
                    seen.add(callee.name)
                    waiting.append((callee, [*way, callee.name]))
        return []


def acts(reference: Reference) -> bool:
    """Of a module of the world: its functions do. Its constants, classes and errors do not."""
    return reference.name not in PURE and not reference.last[0].isupper()


def opens_for_writing(args: list[ast.expr], keywords: list[ast.keyword]) -> bool:
    given = [*args, *(word.value for word in keywords if word.arg in ("mode", "flags"))]
    for value in given:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return bool(set(value.value) & set("wax+"))
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(value)}
        return bool(names & WRITING_FLAGS) or not any(name.startswith("O_") for name in names)
    return False


# --- the rules: what is wrong with a script, one line each ---


def total_lines(source: Source) -> Iterator[str]:
    budget = BUDGETS[source.name][0]
    if source.end > budget:
        yield source.at(source.end, f"{source.end} lines, at most {budget}: remove a mechanism")


def must_read_lines(source: Source) -> Iterator[str]:
    budget = BUDGETS[source.name][1]
    if source.banner > budget:
        yield source.at(source.banner, f"{source.banner} lines to read, at most {budget}")


def banner_stands_once(source: Source) -> Iterator[str]:
    if len(source.banners) != 1:
        yield source.at(1, f"{BANNER!r} stands there {len(source.banners)} times, not once")


def pure_sections_touch_nothing(source: Source) -> Iterator[str]:
    if not source.pure_lines:
        yield source.at(1, 'no section is called "# --- pure: … ---": what decides stands in one')
    for unit in source.units:
        if unit.line in source.pure_lines:
            way = source.way_to_the_world(unit)
            if way:
                chain = " -> ".join(way)
                yield source.at(
                    unit.line, f"not pure: {chain}; pass the value in, or move it to the doors"
                )


def below_the_banner_only_calls(source: Source) -> Iterator[str]:
    kinds: tuple[tuple[str, Callable[[Reference], bool]], ...] = (
        ("starts a program", source.starts_program),
        ("opens a socket", source.opens_socket),
        ("opens or changes a file for writing", source.writes_file),
    )
    for unit in source.units:
        for reference in unit.references:
            for words, found in kinds:
                if reference.line > source.banner and found(reference):
                    yield source.at(
                        reference.line,
                        f"{unit.name} {words} below the banner ({reference.name}): "
                        "call a door that stands above",
                    )


def above_the_banner_nothing_from_below(source: Source) -> Iterator[str]:
    below = {**source.definitions, **source.variables}
    for unit in source.units:
        for reference in unit.references:
            first = reference.name.partition(".")[0]
            if reference.line < source.banner < below.get(first, 0) <= source.end:
                yield source.at(
                    reference.line,
                    f"{unit.name} uses {first}, which stands below the banner "
                    f"(line {below[first]}): move it up, or pass it in",
                )


def names_mean_one_thing(source: Source) -> Iterator[str]:
    for name, line, where in bound_names(source.tree, ""):
        if name in source.definitions and line <= source.end:
            yield source.at(
                line,
                f"{name} in {where or 'the module'} takes the name of what line "
                f"{source.definitions[name]} defines: give one of them another name",
            )


def bound_names(node: ast.AST, where: str) -> Iterator[tuple[str, int, str]]:
    """(name, line, function) of all that is bound inside functions; class bodies do not count."""
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, (*Function, ast.ClassDef)):
            if where and not isinstance(node, ast.ClassDef):
                yield child.name, child.lineno, where
            inside = f"{where}.{child.name}" if where else child.name
        elif isinstance(child, ast.arg):
            yield child.arg, child.lineno, where
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            if not is_field(node):
                yield child.id, child.lineno, where
        elif isinstance(child, ast.ExceptHandler) and child.name:
            yield child.name, child.lineno, where
        elif isinstance(child, ast.alias) and where:
            yield child.asname or child.name, getattr(node, "lineno", 0), where
        if isinstance(child, ast.ClassDef):
            for part in child.body:  # attributes belong to the class, not to the names in force
                if isinstance(part, Function):
                    yield from bound_names(part, f"{inside}.{part.name}")
                elif not isinstance(part, (ast.Assign, ast.AnnAssign)):
                    yield from bound_names(part, inside)
                elif part.value:
                    yield from bound_names(part.value, inside)
        else:
            yield from bound_names(child, inside)


def is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and not node.simple


def constants_stand_above_their_use(source: Source) -> Iterator[str]:
    constants = {
        name: line for name, line in source.variables.items()
        if re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) and line <= source.end
    }  # fmt: skip
    for unit in source.units:
        for reference in unit.references:
            first = reference.name.partition(".")[0]
            if reference.line < constants.get(first, 0):
                yield source.at(
                    reference.line,
                    f"{unit.name} uses {first}, which line {constants[first]} defines: "
                    "move the constant above",
                )


def docstring_paragraphs(source: Source) -> dict[str, str]:
    """Starts, Reads, Writes and Reaches, each with its text; in the order of the docstring."""
    text = ast.get_docstring(source.tree) or ""
    found: dict[str, str] = {}
    word = ""
    for line in text.splitlines():
        start = re.match(rf"({'|'.join(PARAGRAPHS)}): *(.*)", line)
        if start:
            word = start[1]
            found[word] = start[2]
        elif word:
            found[word] += f" {line.strip()}" if line.startswith(" ") else ""
    return found


def docstring_is_a_contract(source: Source) -> Iterator[str]:
    text = ast.get_docstring(source.tree) or ""
    paragraphs = docstring_paragraphs(source)
    if tuple(paragraphs) != PARAGRAPHS:
        yield source.at(1, f"the docstring ends with {', '.join(PARAGRAPHS)}: in this order")
        return
    last = text[text.index("\nStarts:") + 1 :]
    for line in last.splitlines():
        if line and not re.match(rf" +\S|({'|'.join(PARAGRAPHS)}): *\S", line):
            yield source.at(1, f"{line!r} belongs to no paragraph: indent it, or move it up")
    acts_of = {
        "Starts": source.starts_program,
        "Writes": source.writes_file,
        "Reaches": source.opens_socket,
    }
    for word, does in acts_of.items():
        lines = [r.line for unit in source.units for r in unit.references if does(r)]
        if lines and paragraphs[word].strip(" .") == "nothing":
            yield source.at(lines[0], f"the docstring says {word}: nothing; this line does more")


def starts_agrees_with_the_docstring(source: Source) -> Iterator[str]:
    value = starts_of(source)
    if value is None:
        yield source.at(1, "no STARTS = frozenset({…}) with the names of the docstring's Starts:")
        return
    said = re.sub(r"\([^)]*\)", "", docstring_paragraphs(source).get("Starts", "")).strip(" .")
    names = {name.strip() for name in said.split(",")} - {"", "nothing"}
    line = source.variables["STARTS"]
    if names != value:
        yield source.at(line, f"STARTS and the docstring's Starts: differ in {names ^ value}")
    if line > source.banner:
        yield source.at(line, "STARTS stands below the banner: move it up, to the constants")


def starts_of(source: Source) -> set[str] | None:
    for node in source.statements:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if names == ["STARTS"] and source.full_name(node.value.func) == "frozenset":
                values = [ast.literal_eval(argument) for argument in node.value.args]
                return set(values[0]) if values else set()
    return None


def one_door_starts_programs(source: Source) -> Iterator[str]:
    doors: dict[str, int] = {}
    for unit in source.units:
        for reference in unit.references:
            if source.starts_program(reference):
                doors.setdefault(unit.name, reference.line)
    if len(doors) > 1:
        for name, line in doors.items():
            yield source.at(line, f"{name} starts programs, one of {len(doors)}: keep one door")
    for name, line in doors.items():
        if all(reference.name != "STARTS" for reference in source.by_name[name].references):
            yield source.at(line, f"{name} starts what it is given: refuse what is not in STARTS")


def no_script_imports_another(source: Source) -> Iterator[str]:
    others = {name.rpartition(".")[0] for name in BUDGETS}
    for node in ast.walk(source.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            if name.partition(".")[0] in others:
                yield source.at(getattr(node, "lineno", 0), f"imports {name}: scripts run alone")


def says_it_with_if(source: Source) -> Iterator[str]:
    nouns = {
        name for name, node in source.classes.items()
        if any("NamedTuple" in ast.dump(base) for base in node.bases)
        or any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list)
    }  # fmt: skip
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            if any(is_truth(side) for side in (node.left, node.right)):
                yield source.at(line, "multiplies by a truth value: say it with `if`")
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)) and node.orelse:
            yield source.at(line, "a loop with `else`: make it a function that returns")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            spread = any(isinstance(argument, ast.Starred) for argument in node.args)
            if node.func.id in nouns and spread:
                yield source.at(line, f"{node.func.id}(*…): name its fields")


def is_truth(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("bool", "isinstance")
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_not or isinstance(node, (ast.Compare, ast.BoolOp))


# --- the scripts ---


class Rules:
    """The rules, each as a test of one script."""

    name: str
    source: Source

    @classmethod
    def setUpClass(cls) -> None:
        cls.source = Source(cls.name, (ROOT / cls.name).read_text())

    def check(self, rule: Callable[[Source], Iterator[str]]) -> None:
        found = list(dict.fromkeys(rule(self.source)))
        if found:
            raise AssertionError("\n".join([f"{len(found)} found", *found]))

    def test_it_is_short_enough(self) -> None:
        self.check(total_lines)

    def test_what_must_be_read_is_short_enough(self) -> None:
        self.check(must_read_lines)

    def test_one_banner_says_where_a_reader_may_stop(self) -> None:
        self.check(banner_stands_once)

    def test_pure_sections_touch_nothing(self) -> None:
        self.check(pure_sections_touch_nothing)

    def test_below_the_banner_nothing_is_started_opened_or_written(self) -> None:
        self.check(below_the_banner_only_calls)

    def test_above_the_banner_nothing_from_below_is_used(self) -> None:
        self.check(above_the_banner_nothing_from_below)

    def test_a_name_means_one_thing(self) -> None:
        self.check(names_mean_one_thing)

    def test_constants_stand_above_their_use(self) -> None:
        self.check(constants_stand_above_their_use)

    def test_the_docstring_says_what_it_starts_reads_writes_and_reaches(self) -> None:
        self.check(docstring_is_a_contract)

    def test_the_programs_it_may_start_are_those_of_the_docstring(self) -> None:
        self.check(starts_agrees_with_the_docstring)

    def test_one_door_starts_programs(self) -> None:
        self.check(one_door_starts_programs)

    def test_it_runs_without_the_other_scripts(self) -> None:
        self.check(no_script_imports_another)

    def test_it_has_no_tricks(self) -> None:
        self.check(says_it_with_if)


class AgentVMTest(Rules, unittest.TestCase):
    name = "agent_vm.py"


class ProxyTest(Rules, unittest.TestCase):
    name = "github_mcp_proxy.py"


class TokenTest(Rules, unittest.TestCase):
    name = "github_app_token.py"


class EgressTest(Rules, unittest.TestCase):
    name = "lima/egress.py"


class TopLevelTest(unittest.TestCase):
    def test_it_is_what_the_readme_lists(self) -> None:
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files"]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            self.skipTest("not a checkout of git's")
        wanted = set(
            """
            .ci .gitignore CHANGELOG.md LICENSE Makefile README.md agent_vm.py docs
            github_app_token.py github_mcp_proxy.py lima pyproject.toml tests
            """.split()
        )
        self.assertEqual({path.partition("/")[0] for path in listed.splitlines()}, wanted)


class BudgetTest(unittest.TestCase):
    def test_the_readme_is_short_enough(self) -> None:
        lines = len((ROOT / "README.md").read_text().splitlines())
        self.assertLessEqual(lines, README_BUDGET, "README.md: move what is long to docs/")

    def test_lima_is_short_enough(self) -> None:
        files = [*(ROOT / "lima").glob("*.[ys]*"), *(ROOT / "lima").glob("*/*.[sp]*")]
        lines = sum(len(path.read_text().splitlines()) for path in files)
        self.assertLessEqual(lines, LIMA_BUDGET, "lima/: remove a mechanism")
        lines = len((ROOT / "lima/qemu.py").read_text().splitlines())
        self.assertLessEqual(lines, QEMU_BUDGET, "lima/qemu.py: remove a mechanism")


# --- the rules themselves, on made-up scripts ---


GOOD = '''"""Do it.

Starts:   git (to fetch),
          ssh
Reads:    the environment
Writes:   ~/.local/state/x
Reaches:  nothing
"""

import os
import subprocess
from pathlib import Path

STARTS: frozenset[str] = frozenset({"git", "ssh"})
LIMIT = 3

# --- nouns ---


class Door:
    path: Path

    def start(self, argv: list[str]) -> int:
        if os.path.basename(argv[0]) not in STARTS:
            raise ValueError(argv[0])
        return subprocess.run(argv).returncode

    def text(self) -> str:
        return self.path.read_text()


# --- pure: what it decides ---


def shorter(text: str, values: dict[str, str]) -> str:
    name = os.path.basename(os.fsdecode(text)).replace("a", "b")
    return values.get(name, name)[:LIMIT]


# --- doors: files ---


def write(path: Path, content: str) -> None:
    path.write_text(content)


# --- you may stop here: what follows only calls what is above ---


def main() -> int:
    write(Path("x"), shorter(os.environ["HOME"], {}))
    return Door().start(["git"]) + len(Path("x").read_text())


if __name__ == "__main__":
    main()
'''
Rule = Callable[[Source], Iterator[str]]


class RuleTest(unittest.TestCase):
    """Each rule finds what it is for, and has nothing to say about GOOD."""

    def found(self, rule: Rule, old: str = "", new: str = "") -> str:
        self.assertIn(old, GOOD)
        return "\n".join(rule(Source("agent_vm.py", GOOD.replace(old, new, 1) if old else GOOD)))

    def assert_finds(self, rule: Rule, old: str, new: str, *words: str) -> None:
        found = self.found(rule, old, new)
        self.assertTrue(found, f"nothing found in {new!r}")
        for word in words:
            self.assertIn(word, found)

    def above(self, text: str) -> str:
        return f"{text}\n\n\n{BANNER}"

    def test_a_good_script_passes_every_rule(self) -> None:
        hints = total_lines.__annotations__
        rules = [
            value for value in globals().values() if getattr(value, "__annotations__", 0) == hints
        ]
        self.assertIn(says_it_with_if, rules)
        for rule in rules:
            self.assertEqual(self.found(rule), "", rule.__name__)

    def test_budgets(self) -> None:
        most, most_above = BUDGETS["agent_vm.py"]
        long = "\n" * (most_above + 1) + BANNER + "\n" * (most - most_above)
        self.assert_finds(total_lines, BANNER, long, f"at most {most}")
        self.assert_finds(must_read_lines, BANNER, long, f"at most {most_above}")
        copy = f"{GENERATED} by make\n" + "X = 1\n" * most
        self.assertEqual(self.found(total_lines, "if __name__", f"{copy}\nif __name__"), "")

    def test_the_banner(self) -> None:
        self.assert_finds(banner_stands_once, BANNER, "", "0 times")
        self.assert_finds(banner_stands_once, BANNER, f"{BANNER}\n{BANNER}", "2 times")

    def test_pure_sections_direct_use(self) -> None:
        for use in (
            "os.stat(text)", "os.environ", "os.path.realpath(text)", "print(text)", "open(text)",
            "Path(text).read_text()", "Path(text).exists()", "Path(text).replace(name)",
            "subprocess.run([text])", "sys.stdout.write(text)", "time.time()",
            "[os.getcwd() for _ in text]", "(lambda: os.getpid())()", "asyncio.run(text)",
            "loop.create_server(text)", "Path.home()",
        ):  # fmt: skip
            with self.subTest(use=use):
                new = f"    import asyncio, sys, time\n    found = {use}\n    name = "
                self.assert_finds(
                    pure_sections_touch_nothing, "    name = ", new, "shorter -> ", "not pure"
                )

    def test_pure_sections_by_way_of_others(self) -> None:
        old = "    return values.get("
        for use, way in (
            ("write(Path(text), text)", "shorter -> write -> path.write_text"),
            ("list(map(write, text))", "shorter -> write -> path.write_text"),
            ("Door().start(text)", "shorter -> Door.start -> subprocess.run"),
            ("values.start(text)", "shorter -> Door.start -> subprocess.run"),
            ("Door.start", "shorter -> Door.start -> subprocess.run"),
        ):
            with self.subTest(use=use):
                self.assert_finds(pure_sections_touch_nothing, old, f"    {use}\n{old}", way)

    def test_pure_sections_and_variables_with_a_value_from_outside(self) -> None:
        for value in ("os.environ['HOME']", "logging.getLogger('x')", "open('x')"):
            with self.subTest(value=value):
                text = GOOD.replace("LIMIT = 3", f"import logging\n\nLIMIT = {value}")
                found = list(pure_sections_touch_nothing(Source("agent_vm.py", text)))
                self.assertIn("shorter -> LIMIT", "\n".join(found))

    def test_pure_sections_may_have_names_of_the_world(self) -> None:
        for use in (
            "os.path.join(text, os.sep)", "os.O_RDONLY", "subprocess.PIPE", "'a'.replace('a', 'b')",
            "isinstance(text, subprocess.TimeoutExpired)", "values.get(text)", "text.title()",
            "re.match('a', text).start()", "glob.split(text)",
        ):  # fmt: skip
            with self.subTest(use=use):
                new = f"    found = {use}\n    name = "
                self.assertEqual(self.found(pure_sections_touch_nothing, "    name = ", new), "")
        new = "def shorter(stream: os.DirEntry[str], "
        self.assertEqual(self.found(pure_sections_touch_nothing, "def shorter(", new), "")

    def test_a_script_without_a_pure_section(self) -> None:
        self.assert_finds(pure_sections_touch_nothing, "# --- pure: what", "# --- what", "no sec")

    def test_below_the_banner(self) -> None:
        old = "    write(Path("
        for use, words in (
            ("subprocess.run(['git'])", "starts a program"),
            ("os.execvp('git', [])", "starts a program"),
            ("asyncio.create_subprocess_exec('git')", "starts a program"),
            ("socket.create_connection(('', 1))", "opens a socket"),
            ("socket.socket()", "opens a socket"),
            ("urllib.request.urlopen('')", "opens a socket"),
            ("asyncio.start_server(main)", "opens a socket"),
            ("loop.create_server(main)", "opens a socket"),
            ("http.client.HTTPSConnection('')", "opens a socket"),
            ("open('x', 'w')", "for writing"),
            ("open('x', mode='ab')", "for writing"),
            ("open('x', LIMIT)", "for writing"),
            ("os.open('x', os.O_WRONLY | os.O_CREAT)", "for writing"),
            ("Path('x').open('r+')", "for writing"),
            ("Path('x').write_text('')", "for writing"),
            ("Path('x').unlink()", "for writing"),
            ("Path('x').replace('y')", "for writing"),
            ("os.replace('x', 'y')", "for writing"),
            ("shutil.rmtree('x')", "for writing"),
            ("tempfile.TemporaryDirectory()", "for writing"),
        ):
            with self.subTest(use=use):
                imports = "    import asyncio, http.client, shutil, socket, tempfile\n"
                new = f"{imports}    import urllib.request\n    {use}\n{old}"
                self.assert_finds(below_the_banner_only_calls, old, new, words, "main")
                # Above the banner, the same is a door.
                door = self.above(f"def door(loop):\n{imports}    import urllib.request\n    {use}")
                self.assertEqual(self.found(below_the_banner_only_calls, BANNER, door), "")

    def test_below_the_banner_reading_is_free(self) -> None:
        old = "    write(Path("
        for use in (
            "open('x')", "open('x', 'rb')", "os.open(os.devnull, os.O_WRONLY)",
            "Path('x').open()", "os.open('x', os.O_RDONLY)",
            "'x'.replace('y', 'z')", "Path('x').exists()", "subprocess.DEVNULL", "os.getpid()",
        ):  # fmt: skip
            with self.subTest(use=use):
                new = f"    {use}\n{old}"
                self.assertEqual(self.found(below_the_banner_only_calls, old, new), "")

    def test_above_the_banner(self) -> None:
        rule = above_the_banner_nothing_from_below
        self.assert_finds(rule, BANNER, self.above("def early():\n    main()"), "early uses main")
        late = self.above("def early():\n    return [main]")
        self.assert_finds(rule, BANNER, late, "early uses main")
        hint = self.above("def early(story: main) -> main:\n    pass")
        self.assertEqual(self.found(rule, BANNER, hint), "")
        guard = self.above("def early():\n    return Door")
        self.assertEqual(self.found(rule, BANNER, guard), "")

    def test_names(self) -> None:
        for code in (
            "def f(write):\n    pass",
            "def f(*, write=1):\n    pass",
            "def f(*write):\n    pass",
            "def f():\n    write = 1",
            "def f():\n    a, (write, b) = 1, (2, 3)",
            "def f():\n    for write in ():\n        pass",
            "def f():\n    with Door() as write:\n        pass",
            "def f():\n    try:\n        pass\n    except OSError as write:\n        pass",
            "def f():\n    return [write for write in ()]",
            "def f():\n    return lambda write: 1",
            "def f():\n    def write():\n        pass",
            "def f():\n    class Door:\n        pass",
            "def f():\n    from os import write",
            "def f():\n    while write := 1:\n        pass",
            "class C:\n    def m(self, write):\n        pass",
            "class C:\n    def m(self):\n        write = 1",
            "class C:\n    n = [write for write in ()]",
            "write = 1",
            "for write in ():\n    pass",
        ):
            with self.subTest(code=code):
                self.assert_finds(names_mean_one_thing, BANNER, self.above(code), "takes the name")

    def test_names_of_methods_and_attributes_are_free(self) -> None:
        for code in (
            "class C:\n    def write(self):\n        self.shorter = 1",
            "class C:\n    write: int = 1\n    shorter = 2",
            "def f(x):\n    x.write = 1\n    return x.write(shorter=1)",
            "def f():\n    write(1)\n    return {'write': shorter}",
        ):
            with self.subTest(code=code):
                self.assertEqual(self.found(names_mean_one_thing, BANNER, self.above(code)), "")

    def test_constants(self) -> None:
        rule = constants_stand_above_their_use
        late = self.above("def f():\n    return LATE\n\n\nLATE = 1")
        self.assert_finds(rule, BANNER, late, "f uses LATE")
        copy = f"{GENERATED}\nEMBEDDED = {{}}\n"
        new = f"if __name__ == 'x':\n    main(EMBEDDED)\n{copy}"
        self.assertEqual(self.found(rule, 'if __name__ == "__main__":\n    main()\n', new), "")

    def test_the_docstring(self) -> None:
        rule = docstring_is_a_contract
        self.assert_finds(rule, "Reads:    the environment\n", "", "in this order")
        self.assert_finds(rule, "Reads: ", "Reaches: ", "in this order")
        self.assert_finds(rule, "Reaches:  nothing\n", "Reaches:  nothing\n\nMore.\n", "More.")
        self.assert_finds(rule, "Writes:   ~/.local/state/x", "Writes:   nothing", "does more")

    def test_the_list_of_programs(self) -> None:
        rule = starts_agrees_with_the_docstring
        self.assert_finds(rule, "Starts:   git", "Starts:   npm", "git", "npm")
        self.assert_finds(rule, '{"git", "ssh"}', '{"git"}', "ssh")
        self.assert_finds(rule, "STARTS: frozenset[str]", "BEGINS: frozenset[str]", "no STARTS")
        starts = 'STARTS: frozenset[str] = frozenset({"git", "ssh"})\n'
        moved = Source("agent_vm.py", GOOD.replace(starts, "") + starts)
        self.assertIn("below the banner", "\n".join(rule(moved)))

    def test_the_door(self) -> None:
        rule = one_door_starts_programs
        second = self.above("def second():\n    subprocess.Popen(STARTS)")
        self.assert_finds(rule, BANNER, second, "second starts programs", "Door.start")
        self.assert_finds(rule, "not in STARTS", "not in ()", "refuse what is not in STARTS")

    def test_imports(self) -> None:
        rule = no_script_imports_another
        self.assert_finds(rule, "import os\n", "import github_app_token\n", "scripts run alone")
        self.assert_finds(rule, "import os\n", "from github_mcp_proxy import x\n", "run alone")

    def test_tricks(self) -> None:
        for code, words in (
            ("x = 's' * (LIMIT != 1)", "truth value"),
            ("x = bool(LIMIT) * 's'", "truth value"),
            ("x = 's' * (not LIMIT)", "truth value"),
            ("for x in ():\n    pass\nelse:\n    pass", "loop with `else`"),
            ("class N(NamedTuple):\n    a: int\n\n\nx = N(*LIMIT)", "name its fields"),
        ):
            with self.subTest(code=code):
                self.assert_finds(says_it_with_if, BANNER, self.above(code), words)
        self.assertEqual(self.found(says_it_with_if, BANNER, self.above("x = 'ab' * 3")), "")

    def test_every_forbidden_name_exists(self) -> None:
        """A name that is misspelled in a table forbids nothing."""
        names = PROGRAMS | SOCKETS | WRITES | WORLD | PURE
        self.assertEqual([name for name in sorted(names) if not exists(name)], [])


def exists(name: str) -> bool:
    """Whether Python knows it: a builtin, or what a module holds."""
    module, _, _ = name.partition(".")
    if module == name:
        return hasattr(builtins, name)
    value: object = importlib.import_module(module)
    for part in name.split(".")[1:]:
        if not hasattr(value, part):
            value = importlib.import_module(f"{module}.{part}")
        else:
            value = getattr(value, part)
    return True


if __name__ == "__main__":
    unittest.main()
