"""Where webhooks may go: the guard by itself, by example and by property."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_server.addresses import MAX_URL, AddressRefused, Guard, Target, is_public

NOBODY = Guard([])
# IANA's special-purpose registries, written out here a second time, and what else must not be reached.
SPECIAL_4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
]
SPECIAL_6 = [
    *("::/8", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16"),
    *("fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
]


def addresses_of(networks: list[str]) -> st.SearchStrategy[str]:
    def draw(network: str) -> st.SearchStrategy[str]:
        inside = ip_network(network)
        last = int(inside.broadcast_address)
        return st.integers(int(inside.network_address), last).map(lambda n: str(type(inside.network_address)(n)))

    return st.sampled_from(networks).flatmap(draw)


def refused(url: str, guard: Guard = NOBODY) -> str:
    with pytest.raises(AddressRefused) as caught:
        guard.read_url(url)
    return str(caught.value)


@given(addresses_of(SPECIAL_4))
def test_no_special_ipv4_address_is_public_in_whatever_dress(text: str) -> None:
    address = IPv4Address(text)
    dresses = [
        address,
        IPv6Address(f"::ffff:{text}"),
        IPv6Address(f"64:ff9b::{text}"),
        IPv6Address(int(IPv6Address("2002::")) | int(address) << 80),
        IPv6Address(f"::{text}"),
    ]
    for dress in dresses:
        assert not is_public(dress)
        # Neither as it stands in a URL, nor as what a name resolves to
        host = f"[{dress}]" if dress.version == 6 else str(dress)
        refused(f"https://{host}/hook")
        with pytest.raises(AddressRefused):
            NOBODY.check(Target(True, "example.com", 443, "/"), [ip_address("8.8.8.8"), dress])


@given(addresses_of(SPECIAL_6))
def test_no_special_ipv6_address_is_public(text: str) -> None:
    address = IPv6Address(text)
    inner = address.ipv4_mapped
    assert not is_public(address) or (inner is not None and is_public(inner))


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_an_ipv4_address_is_public_unless_a_registry_says_otherwise(address: IPv4Address) -> None:
    special = any(address in ip_network(network) for network in SPECIAL_4)
    assert is_public(address) == (not special)
    assert is_public(IPv6Address(f"::ffff:{address}")) == is_public(IPv6Address(f"64:ff9b::{address}")) == (not special)


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_of_ipv6_only_global_unicast_is_public(address: IPv6Address) -> None:
    if is_public(address):
        assert address.ipv4_mapped or address in ip_network("2000::/3") or address in ip_network("64:ff9b::/96")


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2001:4860:4860::8888"])
def test_public_ones_are(text: str) -> None:
    address = ip_address(text)
    assert is_public(address)
    host = f"[{text}]" if address.version == 6 else text
    assert NOBODY.read_url(f"https://{host}/a?b=c#d") == Target(True, text, 443, "/a?b=c")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "scheme"),
        ("example.com/hook", "scheme"),
        ("//example.com/hook", "scheme"),
        ("ftp://example.com/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("gopher://127.0.0.1:6379/_FLUSHALL", "scheme"),
        ("http://example.com/", "must be https"),
        ("https:///hook", "neither a name"),
        ("https://user:password@example.com/", "user or password"),
        ("https://user@example.com/", "user or password"),
        ("https://example.com\\@127.0.0.1/", "user or password"),
        ("https://example.com:22/", "port is 22"),
        ("https://example.com:6379/", "port is 6379"),
        ("https://example.com:99999/", "99999"),
        ("https://example.com:x/", "read"),
        ("https://127.1/", "neither a name nor an address"),
        ("https://2130706433/", "neither a name nor an address"),
        ("https://0x7f000001/", "neither a name nor an address"),
        ("https://0177.0.0.1/", "cannot be read"),
        ("https://[fe80::1%25eth0]/", "neither a name nor an address"),
        ("https://exa mple.com/", "neither a name nor an address"),
        ("https://127.0.0.1./", "not on the public internet"),
        ("https://169.254.169.254/latest/meta-data/", "not on the public internet"),
        ("https://example.com/\r\nx-evil: 1", "read"),
        ("https://example.com/" + "a" * MAX_URL, str(MAX_URL)),
    ],
)
def test_what_is_refused_without_looking_up(url: str, why: str) -> None:
    assert why in refused(url)


@given(
    st.text(max_size=60),
    st.sampled_from(["", "http://", "https://", "https://example.com", "https://[", "https://8.8.8.8"]),
)
def test_any_text_is_read_or_refused(text: str, before: str) -> None:
    try:
        target = NOBODY.read_url(before + text)
    except AddressRefused as error:
        assert str(error)
    else:
        # What is let through goes out over https, to a name or a public address, in characters that HTTP allows
        assert target.secure and target.port in (443, 8443)
        assert target.host.isascii() and not set(target.host) & set("/@\\ %?#")
        assert (
            target.path.startswith("/")
            and target.path.isascii()
            and target.path.isprintable()
            and " " not in target.path
        )


def test_international_names_go_over_the_wire_in_ascii() -> None:
    assert NOBODY.read_url("https://ตัวอย่าง.com/รับ") == Target(
        True, "xn--72c1a1bt4awk9o.com", 443, "/%E0%B8%A3%E0%B8%B1%E0%B8%9A"
    )


def test_a_name_with_one_private_address_is_refused_whole() -> None:
    target = Target(True, "example.com", 443, "/")
    NOBODY.check(target, [ip_address("8.8.8.8"), ip_address("2606:4700::1111")])
    with pytest.raises(AddressRefused) as caught:
        NOBODY.check(target, [ip_address("8.8.8.8"), ip_address("10.0.0.7")])
    # And the sender does not learn which address it was
    assert "10.0.0.7" not in str(caught.value) and "QUEUE_WEBHOOK_ALLOWED_HOSTS" in str(caught.value)


def test_what_the_operator_allows() -> None:
    guard = Guard(["receiver.local:8080", "Printer.Local", "10.0.0.0/8", "[fd00::1]:99", "192.168.7.7", ""])
    private = [ip_address("10.1.2.3")]
    elsewhere = [ip_address("172.16.0.1")]
    # A host with its port, there alone
    guard.check(guard.read_url("http://receiver.local:8080/"), elsewhere)
    with pytest.raises(AddressRefused):
        guard.check(guard.read_url("http://receiver.local:8081/"), elsewhere)
    # A host on any port, in whatever letters
    guard.check(guard.read_url("http://PRINTER.local.:631/"), elsewhere)
    # A network: addresses in it, and names that lie in it with all their addresses
    guard.read_url("http://10.9.9.9:5000/")
    guard.check(guard.read_url("http://some.name:5000/"), private)
    with pytest.raises(AddressRefused):
        guard.check(guard.read_url("http://some.name:5000/"), [*private, *elsewhere])
    guard.check(guard.read_url("https://some.name/"), [*private, ip_address("8.8.8.8")])
    # One address, with its port and without
    guard.read_url("http://[fd00::1]:99/")
    refused("http://[fd00::1]:98/", guard)
    guard.read_url("http://192.168.7.7:1234/")
    guard.read_url("http://[::ffff:192.168.7.7]:1234/")
    # And everything else is as it was
    refused("https://127.0.0.1/", guard)
    refused("http://172.16.0.1/", guard)


@pytest.mark.parametrize("entry", ["http://x", "a/b", "user@host", "host:port", "10.0.0.0/99", "?"])
def test_an_entry_that_cannot_be_read_is_named(entry: str) -> None:
    with pytest.raises(ValueError) as caught:
        Guard([entry])
    assert repr(entry) in str(caught.value)
