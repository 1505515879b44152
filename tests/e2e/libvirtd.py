"""A libvirtd of one's own: its state, its networks and its guests end with it, and the machine's own is not touched.

It runs in namespaces, with the files that it keeps on file systems in memory. The first process there is a shell, which
reaps guests: libvirtd, which does not, would wait for the dead. Needs root.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 30.0

_CONFIG = """unix_sock_dir = "{folder}"
auth_unix_rw = "none"
"""
# As root, since libvirt's own user could not read what tests write. The rest needs services that do not run here.
_QEMU = """user = "root"
group = "root"
remember_owner = 0
namespaces = []
cgroup_controllers = []
security_driver = "none"
stdio_handler = "file"
"""
_NETWORK = """<network><name>default</name><forward mode="open"/><bridge name="virbr0"/><dns enable="no"/>
<ip address="192.0.2.1" netmask="255.255.255.0"/></network>
"""
_SCRIPT = """set -e
for file in passwd group; do mount --bind $0/$file /etc/$file; done
for name in /etc/libvirt /run/libvirt /var/cache/libvirt /var/lib/libvirt /var/log/libvirt; do
  mkdir -p $name; mount -t tmpfs none $name
done
mkdir -p /var/lib/libvirt/dnsmasq /var/lib/libvirt/qemu /var/log/libvirt/qemu
cp $0/qemu.conf /etc/libvirt
ip link set lo up
libvirtd --config $0/libvirtd.conf --pid-file $0/pid &
wait $!
"""


@contextmanager
def private_libvirt(folder: Path) -> Iterator[str]:
    """Run libvirtd for the block, with a network `default`; yield its URI. `folder`: short, for sockets lie in it."""
    for name, text in (("libvirtd.conf", _CONFIG.format(folder=folder)), ("qemu.conf", _QEMU), ("net.xml", _NETWORK)):
        (folder / name).write_text(text)
    _users(folder)
    own = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--mount-proc", "--kill-child"]
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen([*own, "sh", "-c", _SCRIPT, str(folder)], stdout=log, stderr=log)
    uri = f"qemu+unix:///system?socket={folder}/libvirt-sock"
    try:
        _wait_for(folder / "libvirt-sock", daemon, folder / "log")
        virsh(uri, "net-define", str(folder / "net.xml"))
        virsh(uri, "net-start", "default")
        yield uri
    finally:
        daemon.kill()  # unshare does not heed SIGTERM; its children go with it
        daemon.wait(30)


def virsh(uri: str, *words: str) -> str:
    """Run virsh; return what it says."""
    done = subprocess.run(["virsh", "-q", "-c", uri, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _users(folder: Path) -> None:
    """Write lists of users and groups with those that libvirtd looks for, which its Debian package would make."""
    for file, line in (("passwd", "libvirt-qemu:x:64055:64055::/:/bin/false\n"), ("group", "libvirt-qemu:x:64055:\n")):
        there = Path("/etc", file).read_text()
        (folder / file).write_text(there if "libvirt-qemu:" in there else there + line)


def _wait_for(socket: Path, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not socket.exists():
        assert daemon.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
