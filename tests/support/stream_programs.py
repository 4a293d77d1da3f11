# SPDX-License-Identifier: Apache-2.0
"""The programs of `tests.support.stream`, as text: they run inside containers, with nothing but Python.

Each writes what it knows to $FACTS/<role>.json (/tmp without FACTS) every 50 ms.  Times are CLOCK_MONOTONIC,
which all processes of a machine share.
"""

from __future__ import annotations

# `pump` is one end of each of its connections: it sends a byte every 10 ms, and keeps each pause of more than
# 30 ms between two bytes that came in, with the time of its end.
_COMMON = """
import collections, json, os, selectors, socket, sys, time
FACTS = os.environ.get("FACTS", "/tmp")
def report(role, **facts):
    temporary = f"{FACTS}/.{role}.json"
    with open(temporary, "w") as file:
        json.dump({"now": time.monotonic(), "error": "", **facts}, file)
    os.rename(temporary, f"{FACTS}/{role}.json")
def connect(address, port):
    for _ in range(200):
        try:
            return socket.create_connection((address, int(port)), 1)
        except OSError:
            time.sleep(0.05)
    sys.exit(f"nobody answers at {address}:{port}")
class Stream:
    def __init__(self, connection):
        self.connection, self.received, self.last = connection, 0, time.monotonic()
        self.pauses = collections.deque(maxlen=1000)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    def receive(self):
        try:
            data = self.connection.recv(65536)
        except OSError as failure:
            return str(failure)
        now = time.monotonic()
        if now - self.last > 0.03:
            self.pauses.append((now, 1000 * (now - self.last)))
        self.last, self.received = now, self.received + len(data)
        return "" if data else "closed"
    def send(self):
        try:
            self.connection.send(b"x")
        except BlockingIOError:
            pass
        except OSError as failure:
            return str(failure)
        return ""
    def facts(self):
        return {"received": self.received, "last": self.last, "pauses": list(self.pauses)}
def pump(role, **connections):
    streams = {name: Stream(each) for name, each in connections.items()}
    selector = selectors.DefaultSelector()
    for each in streams.values():
        selector.register(each.connection, selectors.EVENT_READ, each)
    error, said, tick = "", 0, 0
    while not error:
        for key, _ in selector.select(0.005):
            error = error or key.data.receive()
        now = time.monotonic()
        if now - tick >= 0.01:
            tick = now
            for each in streams.values():
                error = error or each.send()
        if now - said >= 0.05 or error:
            said = now
            report(role, error=error, streams={name: each.facts() for name, each in streams.items()})
def accept(listener, number):
    accepted = (listener.accept() for _ in range(number))
    return {peer[0]: connection for connection, peer in accepted}
"""

# SERVER <number of connections>: their names are their peers' addresses.
SERVER = (
    _COMMON
    + """
listener = socket.create_server(("0.0.0.0", 9000))
report("server", streams={})
pump("server", **accept(listener, int(sys.argv[1])))
"""
)
# CLIENT <address> <port> …: the names of its connections are the addresses.
CLIENT = (
    _COMMON
    + """
report("client", streams={})
pump("client", **{address: connect(address, port) for address, port in zip(sys.argv[1::2], sys.argv[2::2])})
"""
)
# MACHINE <own address> <address> <port>: one connection to there, and one that it waits for.
MACHINE = (
    _COMMON
    + """
listener = socket.create_server((sys.argv[1], 9000))
report("machine", streams={})
there = connect(*sys.argv[2:])
pump("machine", **{sys.argv[2]: there, "accepted": listener.accept()[0]})
"""
)
# Both ends over the container's own loopback: what the machine's scheduler does to everybody.
CONTROL = (
    _COMMON
    + """
listener = socket.create_server(("127.0.0.1", 9001))
here = socket.create_connection(("127.0.0.1", 9001))
pump("control", here=here, there=listener.accept()[0])
"""
)
# Counts the IPv4 packets that reach the container's card, before any firewall or socket: source and protocol.
COUNTER = (
    _COMMON
    + """
tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
tap.settimeout(0.05)
count, said = collections.Counter(), 0
while True:
    try:
        packet, card = tap.recvfrom(64)
        if card[2] == socket.PACKET_HOST:
            count[f"{socket.inet_ntoa(packet[12:16])} {packet[9]}"] += 1
    except TimeoutError:
        pass
    if time.monotonic() - said >= 0.05:
        said = time.monotonic()
        report("counter", count=count)
"""
)
# PROBER <address> <s>: a numbered datagram every 10 ms to the prober there, and an answer to each of its own.
# `lost` are the times at which those were sent that have had no answer for so many seconds.
PROBER = (
    _COMMON
    + """
PORT, LATE_S = 9200, float(sys.argv[2])
there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
here.bind(("0.0.0.0", PORT))
for each in (here, there):
    each.setblocking(False)
selector = selectors.DefaultSelector()
selector.register(here, selectors.EVENT_READ)
selector.register(there, selectors.EVENT_READ)
waiting, lost, sent, answered = {}, {}, 0, 0
said = tick = 0
def send():
    try:
        there.sendto(str(sent).encode(), (sys.argv[1], PORT))
    except OSError:
        pass
while True:
    for key, _ in selector.select(0.005):
        try:
            data, peer = key.fileobj.recvfrom(64)
            if key.fileobj is here:
                here.sendto(data, peer)
            elif waiting.pop(int(data), None) is not None or lost.pop(int(data), None) is not None:
                answered += 1
        except OSError:
            pass
    now = time.monotonic()
    if now - tick >= 0.01:
        tick, waiting[sent] = now, now
        send()
        sent += 1
    while waiting and now - (oldest := next(iter(waiting.items())))[1] > LATE_S:
        del waiting[oldest[0]]
        lost[oldest[0]] = oldest[1]
    while len(lost) > 1000:
        del lost[next(iter(lost))]
    if now - said >= 0.05:
        said = now
        report("prober", sent=sent, answered=answered, lost=list(lost.values()))
"""
)
# SENDER <address>: a datagram, an echo request and a SYN every 10 ms, each SYN from another port.
SENDER = (
    _COMMON
    + """
ECHO = bytes.fromhex("0800f7fd00010001")
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
echoes = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
def syn():
    with socket.socket() as client:
        client.setblocking(False)
        client.connect_ex((sys.argv[1], 9100))
kinds = {
    socket.IPPROTO_UDP: lambda: datagrams.sendto(b"x", (sys.argv[1], 9100)),
    socket.IPPROTO_ICMP: lambda: echoes.sendto(ECHO, (sys.argv[1], 0)),
    socket.IPPROTO_TCP: syn,
}
sent, said = dict.fromkeys(map(int, kinds), 0), 0
while True:
    for kind, send in kinds.items():
        try:
            send()
            sent[kind] += 1
        except OSError:
            pass
    if time.monotonic() - said >= 0.05:
        said = time.monotonic()
        report(f"sender-{sys.argv[1]}", sent=sent)
    time.sleep(0.01)
"""
)
