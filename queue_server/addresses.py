"""Says where a webhook may be sent: to public addresses over https, and to what the operator allows besides.

A URL comes from whoever submits jobs. Without this guard it could name the host's own services, its neighbours, or a cloud's
metadata server, and this server would knock there for its sender (server-side request forgery).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL = 2048
"""Characters of a webhook's URL."""

# The ports of https; others are those of services that never expected a webhook.
_PORTS = (443, 8443)
# What Python 3.11 takes for global: IETF's protocol assignments (Oracle's metadata server is there), the relays of 6to4 (RFC
# 7526), Azure's door to a virtual machine's host, documentation (RFC 9637).
_NOT_PUBLIC = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20")))
# Where IANA gives out public IPv6 addresses, the tunnels among them (their inner IPv4 address could be any) left out.
_GLOBAL_UNICAST = ip_network("2000::/3")
_TUNNELS = (ip_network("2001::/32"), ip_network("2002::/16"))
# A network without IPv4 reaches IPv4 through these (RFC 6052): the last 32 bits are the address that is meant.
_NAT64 = ip_network("64:ff9b::/96")
# `127.1` and `0x7f000001` are addresses to some resolvers: a host whose last label is a number must be an address in full.
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class AddressRefused(Exception):
    """A webhook must not be sent there; its text is for the sender of the job."""


@dataclass(frozen=True)
class Target:
    """A webhook's URL, read: `path` with its query; `host` in ASCII, as it is looked up and as TLS verifies it."""

    secure: bool
    host: str
    port: int
    path: str


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and to one host there."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST or any(address in tunnel for tunnel in _TUNNELS):
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address.version == network.version and address in network for network in _NOT_PUBLIC)
    )


class Guard:
    """The rule, with the operator's exceptions: `host`, `host:port`, `address`, `address:port`, or a network as `10.0.0.0/8`.

    What is allowed may be private, may be spoken to over http, and on any port (or on the one that is named).
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        """Raises ValueError, with the entry that cannot be read."""
        self._names: set[tuple[str, int | None]] = set()
        self._networks: list[tuple[Network, int | None]] = []
        for entry in filter(None, (entry.strip() for entry in allowed)):
            self._allow(entry)

    def read_url(self, url: str) -> Target:
        """Reads a URL and refuses what can be refused without looking its host up; raises AddressRefused."""
        if len(url) > MAX_URL:
            raise AddressRefused(f"it has {len(url)} characters; the limit is {MAX_URL}")
        try:
            read = httpx.URL(url)
            # As it goes over the wire: international names in ASCII, odd characters escaped.
            host, path = read.raw_host.decode("ascii").rstrip(".").lower(), read.raw_path.decode("ascii")
        except (httpx.InvalidURL, UnicodeError, ValueError, TypeError) as error:
            raise AddressRefused(f"it cannot be read: {error}") from None
        if read.scheme not in ("https", "http"):
            raise AddressRefused(f"its scheme is {read.scheme!r}; it must be https")
        if read.userinfo:
            raise AddressRefused(
                "it contains a user or password; put what the receiver must know into the path or query"
            )
        secure = read.scheme == "https"
        target = Target(secure, host, read.port or (443 if secure else 80), path)
        address = _literal(host)
        if address is None and (not _NAME.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2])):
            raise AddressRefused(f"its host {host!r} is neither a name nor an address in full")
        # A name may lie in a network that is allowed: its addresses will tell.
        if address is not None or not self._networks:
            self.check(target, [] if address is None else [address])
        return target

    def check(self, target: Target, addresses: Iterable[Address]) -> None:
        """Refuses a target whose host has any address that it must not have; raises AddressRefused."""
        addresses = tuple(addresses)
        if (target.host, None) in self._names or (target.host, target.port) in self._names:
            return
        if addresses and all(self._is_in_allowed_network(address, target.port) for address in addresses):
            return
        if not target.secure:
            raise AddressRefused(
                "its scheme is 'http'; it must be https, unless QUEUE_WEBHOOK_ALLOWED_HOSTS has its host"
            )
        if target.port not in _PORTS:
            raise AddressRefused(
                f"its port is {target.port}; it must be 443 or 8443, unless QUEUE_WEBHOOK_ALLOWED_HOSTS has its host"
            )
        for address in addresses:
            if not is_public(address) and not self._is_in_allowed_network(address, target.port):
                # Which address it was is not for the sender: it would map the network behind this server.
                raise AddressRefused(
                    f"its host {target.host!r} is not on the public internet, and not in QUEUE_WEBHOOK_ALLOWED_HOSTS"
                )

    def _allow(self, entry: str) -> None:
        try:
            self._networks.append((ip_network(entry), None))
            return
        except ValueError:
            pass
        try:
            read = httpx.URL(f"//{entry}")
            host, port = read.raw_host.decode("ascii").rstrip(".").lower(), read.port
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise ValueError(f"{entry!r} is no host, host:port, or network: {error}") from None
        if not host or read.userinfo or read.path not in ("", "/") or read.query:
            raise ValueError(f"{entry!r} is no host, host:port, or network")
        address = _literal(host)
        if address is None:
            self._names.add((host, port))
        else:
            self._networks.append((ip_network(address), port))

    def _is_in_allowed_network(self, address: Address, port: int) -> bool:
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(
            allowed_port in (None, port) and address.version == network.version and address in network
            for network, allowed_port in self._networks
        )


def _literal(host: str) -> Address | None:
    """The address that a host is; with a zone (`fe80::1%eth0`) it is none that can be reached from elsewhere."""
    try:
        return None if "%" in host else ip_address(host)
    except ValueError:
        return None
