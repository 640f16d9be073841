"""The process in which chat templates run. A template comes from a model's author, so it is untrusted code.

Run by path, never imported by jaxpost: a child process with jinja2's sandbox and caps on processor time and memory.
The operating system enforces both, because one C call (9**9**9, 'x' * 10**12) can be as expensive as any loop
and no hook inside the interpreter would see it. Requests and replies are JSON with a 4-byte length in front.
"""

import json
import secrets
import signal
import struct
import sys
from datetime import datetime

CPU_SECONDS = 1.0  # a request; real templates take milliseconds
MEMORY_BYTES = 1 << 30
MAX_CHARS = 4_000_000
CACHED_TEMPLATES = 64
REASONING = ("reasoning_content", "thinking", "reasoning")  # one text, three names in the wild


def limit_process():
    """Caps memory, forbids files, and leaves signals meant for the trainer to the trainer."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent saves and goes on rendering; we end when its pipe closes
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for name, value in (("RLIMIT_AS", MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):  # e.g. macOS knows no RLIMIT_AS; the processor cap still holds
            pass


def build_environment(marks, clock):
    """The sandbox in which transformers renders, plus `generation` blocks that set `marks` around their text.

    clock["now"] is the time that templates see, None the real one.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks["present"] = True
            return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

        def _wrap(self, caller):
            return f"{marks['open']}{caller()}{marks['close']}"

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(form):
        return (clock["now"] or datetime.now()).strftime(form)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def plain_dict(*args, **kwargs):  # a function has no attributes to climb, a type has
        return dict(*args, **kwargs)

    class PublicNamespace(Namespace):
        """A namespace that stores no underscore names: those would be a way into the interpreter."""

        def __init__(*args, **kwargs):
            self, rest = args[0], args[1:]
            values = dict(*rest, **kwargs)
            for name in values:
                check_public(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            check_public(name)
            Namespace.__setitem__(self, name, value)

    def check_public(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=plain_dict, namespace=PublicNamespace
    )
    return env


def tidy(messages):
    """Messages as templates expect them: no None fields, reasoning under each of its names."""
    result = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        result.append(message)
    return result


class Renderer:
    """One compiled template."""

    def __init__(self, source):
        self.marks = {"present": False, "open": "", "close": ""}
        self.clock = {"now": None}
        self.template = build_environment(self.marks, self.clock).from_string(source)

    def text(self, messages, add_generation_prompt, variables):
        """The rendered chat, stopped at MAX_CHARS."""
        pieces, size = [], 0
        for piece in self.template.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        ):
            size += len(piece)
            if size > MAX_CHARS:
                raise ValueError(f"the output is longer than {MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def spans(self, messages, variables, expected):
        """Character spans of the generation blocks in `expected`, the same chat rendered without marks."""
        nonce = secrets.token_hex(8)  # a message cannot forge a mark that it cannot guess
        self.marks.update(open=f"\ufdd0{nonce}<", close=f"\ufdd0{nonce}>")
        try:
            marked = self.text(messages, False, variables)
        finally:
            self.marks.update(open="", close="")
        spans, clean, start, depth = [], "", 0, 0
        for index, part in enumerate(marked.split(f"\ufdd0{nonce}")):
            if index:
                depth += 1 if part[0] == "<" else -1
                if part[0] == "<" and depth == 1:
                    start = len(clean)
                elif depth == 0:
                    spans.append((start, len(clean)))
                part = part[1:]
            clean += part
        if clean != expected:
            raise ValueError("the template changes text that its generation block already produced")
        return spans


def render(renderer, request):
    """The full text, and for a training row the spans and the lengths of the prefixes asked for."""
    messages, variables = tidy(request["messages"]), request["variables"]
    renderer.clock["now"] = datetime.fromisoformat(request["date"]) if request["date"] else None
    full = renderer.text(messages, request["add_generation_prompt"], variables)
    reply = {"text": full, "spans": None, "prefixes": []}
    if request["mark"] and renderer.marks["present"]:
        reply["spans"] = renderer.spans(messages, variables, full)
    prefixes = request["prefixes"] if reply["spans"] is None else request["prefixes_with_marks"]
    for count, add_generation_prompt in prefixes:
        text = renderer.text(messages[:count], add_generation_prompt, variables)
        if not full.startswith(text):
            return {"not_prefix": {"count": count, "text": text, "full": full}}
        reply["prefixes"].append(len(text))
    return reply


def answer(request, cache):
    """Reply to one request; a failing template is a reply too."""
    try:
        source = request["template"]
        if source not in cache:
            while len(cache) >= CACHED_TEMPLATES:
                del cache[next(iter(cache))]
            cache[source] = Renderer(source)
        return render(cache[source], request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:600]}


def serve(stdin, stdout):
    """Answers requests until the parent closes the pipe."""
    cache = {}
    while len(head := stdin.read(4)) == 4:
        request = json.loads(stdin.read(struct.unpack("<I", head)[0]))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, even inside a C call
        reply = json.dumps(answer(request, cache)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        stdout.write(struct.pack("<I", len(reply)) + reply)
        stdout.flush()


if __name__ == "__main__":
    limit_process()
    serve(sys.stdin.buffer, sys.stdout.buffer)
