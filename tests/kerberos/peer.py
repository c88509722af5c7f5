"""Runs GSSAPI calls for a test: one command per line on stdin, one answer per line on stdout.

Bytes are hexadecimal, "-" for none. The first command for a context chooses its name.

    init CONTEXT SERVICE FLAGS    accept CONTEXT    step CONTEXT TOKEN    wrap CONTEXT ENCRYPT DATA    unwrap CONTEXT TOKEN
    limit CONTEXT ENCRYPT    flags CONTEXT    name CONTEXT
"""
import sys

import gssapi

contexts = {}


def from_hex(text):
    return b"" if text == "-" else bytes.fromhex(text)


def to_hex(data):
    return data.hex() if data else "-"


def execute(command, name, *rest):
    if command == "init":
        service, flags = rest
        kind = gssapi.NameType.kerberos_principal if "/" in service else gssapi.NameType.hostbased_service
        target = gssapi.Name(service, kind)
        # New credentials for each context, because a test can change the ticket cache.
        credentials = gssapi.Credentials(usage="initiate")
        contexts[name] = gssapi.SecurityContext(name=target, creds=credentials, usage="initiate", flags=int(flags))
        return "ok"
    if command == "accept":
        credentials = gssapi.Credentials(usage="accept")
        contexts[name] = gssapi.SecurityContext(creds=credentials, usage="accept")
        return "ok"
    context = contexts[name]
    if command == "step":
        output = context.step(from_hex(rest[0]) or None)
        return f"{to_hex(output)} {'complete' if context.complete else 'continue'}"
    if command == "wrap":
        return to_hex(context.wrap(from_hex(rest[1]), rest[0] == "1").message)
    if command == "unwrap":
        result = context.unwrap(from_hex(rest[0]))
        return f"{to_hex(result.message)} {'encrypted' if result.encrypted else 'integrity'}"
    if command == "limit":
        return str(context.get_wrap_size_limit(65535, rest[0] == "1"))
    if command == "flags":
        return str(int(context.actual_flags))
    if command == "name":
        return str(context.initiator_name)
    raise ValueError(command)


for line in sys.stdin:
    try:
        answer = execute(*line.split())
    except Exception as error:
        answer = "error " + " ".join(f"{type(error).__name__}: {error}".split())
    print(answer, flush=True)
