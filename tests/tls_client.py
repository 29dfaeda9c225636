"""A TLS client of a monitor: tls_client.py PORT DIRECTORY plain|websocket HOSTNAME

Trusts the authority in the directory ("-": speaks no TLS), shows its client certificate if there is one, and prints as JSON what came of it.
"""

import json
import os
import socket
import ssl
import sys


def context(directory):
    made = ssl.create_default_context(cafile=os.path.join(directory, "ca-cert.pem"))
    certificate = os.path.join(directory, "client-cert.pem")
    if os.path.exists(certificate):
        made.load_cert_chain(certificate, os.path.join(directory, "client-key.pem"))
    return made


def converse(receive, send):
    greeting = json.loads(receive())
    send(b'{"execute": "qmp_capabilities"}{"execute": "query-version"}\n')
    version = None
    while version is None:
        version = json.loads(receive()).get("return", {}).get("qemu")
    return {"greeting": "QMP" in greeting, "version": version == greeting["QMP"]["version"]["qemu"]}


def plain(port, directory, hostname):
    raw = socket.create_connection(("127.0.0.1", port), timeout=60)
    with context(directory).wrap_socket(raw, server_hostname=hostname) as stream:
        lines = stream.makefile("rb")

        def line():
            # A server that refuses says so only after a client of TLS 1.3 has gone on.
            received = lines.readline()
            if not received:
                raise EOFError("the server has closed the connection")
            return received

        return {**converse(line, stream.sendall), "protocol": stream.version()}


def websocket(port, directory, hostname):
    from websockets.sync.client import connect

    arguments = {"subprotocols": ["binary"], "proxy": None}
    scheme = "ws"
    if directory != "-":
        scheme = "wss"
        arguments.update(ssl=context(directory), server_hostname=hostname)
    with connect(f"{scheme}://127.0.0.1:{port}/", **arguments) as stream:
        buffered = b""

        def line():
            nonlocal buffered
            while b"\n" not in buffered:
                piece = stream.recv(timeout=60)
                assert isinstance(piece, bytes)
                buffered += piece
            first, buffered = buffered.split(b"\n", 1)
            return first

        stream.ping().wait(60)
        return {**converse(line, stream.send), "protocol": stream.subprotocol}


def main():
    port, directory, kind, hostname = sys.argv[1:5]
    try:
        result = (websocket if kind == "websocket" else plain)(int(port), directory, hostname)
    except Exception as error:  # what a client is told is what the test is about
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))


main()
