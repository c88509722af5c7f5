"""A library of GSSAPI that is not s5's: one command a line on stdin, one answer a line on stdout.

Octets are in hexadecimal, "-" for none. Contexts go by any name that has not been used before.

    init CONTEXT SERVICE FLAGS    accept CONTEXT    step CONTEXT TOKEN    wrap CONTEXT SEAL DATA    unwrap CONTEXT TOKEN
    limit CONTEXT SEAL    flags CONTEXT    name CONTEXT
"""
import sys

import gssapi

contexts = {}


def octets(text):
    return b"" if text == "-" else bytes.fromhex(text)


def text(octets):
    return octets.hex() if octets else "-"


def do(command, name, *rest):
    if command == "init":
        service, flags = rest
        kind = gssapi.NameType.kerberos_principal if "/" in service else gssapi.NameType.hostbased_service
        target = gssapi.Name(service, kind)
        # Each with credentials of its own, so that a ticket cache may change meanwhile.
        credentials = gssapi.Credentials(usage="initiate")
        contexts[name] = gssapi.SecurityContext(name=target, creds=credentials, usage="initiate", flags=int(flags))
        return "ok"
    if command == "accept":
        credentials = gssapi.Credentials(usage="accept")
        contexts[name] = gssapi.SecurityContext(creds=credentials, usage="accept")
        return "ok"
    context = contexts[name]
    if command == "step":
        output = context.step(octets(rest[0]) or None)
        return f"{text(output)} {'complete' if context.complete else 'continue'}"
    if command == "wrap":
        return text(context.wrap(octets(rest[1]), rest[0] == "1").message)
    if command == "unwrap":
        result = context.unwrap(octets(rest[0]))
        return f"{text(result.message)} {'sealed' if result.encrypted else 'signed'}"
    if command == "limit":
        return str(context.get_wrap_size_limit(65535, rest[0] == "1"))
    if command == "flags":
        return str(int(context.actual_flags))
    if command == "name":
        return str(context.initiator_name)
    raise ValueError(command)


for line in sys.stdin:
    try:
        answer = do(*line.split())
    except Exception as error:
        answer = "error " + " ".join(f"{type(error).__name__}: {error}".split())
    print(answer, flush=True)
