"""`tasks.models`: values, and what operators write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from tasks.errors import InvalidInput, NotBuilt
from tasks.models import (
    Connection,
    DownloadJob,
    ExportJob,
    ExportOptions,
    RollbackJob,
    SyncJob,
    Trust,
    VddkJob,
    WarmJob,
    normalise_thumbprint,
    split_address,
)

SHA1 = "AB" * 20
SHA256 = "0F" * 32


@pytest.mark.parametrize("digits", [SHA1, SHA256])
@pytest.mark.parametrize(
    "spelled",
    [
        lambda d: d,
        str.lower,
        lambda d: ":".join(d[i : i + 2] for i in range(0, len(d), 2)),
        lambda d: " ".join(d[i : i + 2] for i in range(0, len(d), 2)),
        lambda d: "-".join(d[i : i + 2] for i in range(0, len(d), 2)).lower(),
        lambda d: f"  {d}\n",
        lambda d: f"{'SHA1' if len(d) == 40 else 'SHA256'}:{d}",
        lambda d: f"{'sha1' if len(d) == 40 else 'sha256'} Fingerprint={d}",
        lambda d: f"{'sha-1' if len(d) == 40 else 'SHA-256'} Fingerprint={d}",
    ],
)
def test_a_thumbprint_in_any_usual_spelling_is_read(digits, spelled):
    assert normalise_thumbprint(spelled(digits)) == digits


@pytest.mark.parametrize("text", ["", "AB:CD", SHA1[:-1], SHA1 + "0", "Z" * 40, SHA256[:-2]])
def test_what_is_no_thumbprint_is_refused_with_how_to_get_one(text):
    with pytest.raises(InvalidInput, match="openssl"):
        normalise_thumbprint(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vc.example.com", ("vc.example.com", None)),
        ("vc.example.com:8443", ("vc.example.com", 8443)),
        ("10.0.0.1:443", ("10.0.0.1", 443)),
        ("[fe80::1]:8443", ("fe80::1", 8443)),
        ("[fe80::1]", ("fe80::1", None)),
        ("fe80::1", ("fe80::1", None)),
        ("https://vc.example.com/sdk", ("vc.example.com", None)),
        ("https://vc.example.com:8443/sdk", ("vc.example.com", 8443)),
        (" vc ", ("vc", None)),
    ],
)
def test_an_address_is_a_host_and_perhaps_a_port(text, expected):
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["", "a b", "vc:port", "vc:", "[fe80::1", ":443"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InvalidInput):
        split_address(text)


@given(st.text(max_size=30))
def test_reading_an_address_ends_in_a_host_or_in_our_error(text):
    try:
        host, _ = split_address(text)
    except InvalidInput:
        return
    assert host


def test_a_connection_shows_no_password_and_can_be_a_key():
    connection = Connection(host="vc", username="u", password=SecretStr("hunter2"), trust=Trust(thumbprint=SHA1))
    assert "hunter2" not in repr(connection) + connection.model_dump_json() + str(connection)
    assert {connection: 1}[connection.model_copy()] == 1
    assert connection.address == "vc:443"
    assert Connection(host="::1", username="u", password=SecretStr("p")).address == "[::1]:443"


def test_the_sources_options_become_the_modes_own():
    options = ExportOptions(vm_name="web", output_dir="/data", export_mode="export", transport="folder", format="raw")
    job = options.job()
    assert isinstance(job, ExportJob)
    assert (job.vm_name, str(job.output_dir), job.transport, job.format) == ("web", "/data", "folder", "raw")


@pytest.mark.parametrize(
    ("field", "value"),
    [("export_mode", "live_migration"), ("transport", "carrier_pigeon")],
)
def test_what_is_not_built_is_refused_by_name(field, value):
    with pytest.raises(NotBuilt, match=f"{value}.*is not built yet"):
        ExportOptions(vm_name="web", output_dir="/data", **{field: value}).job()


def test_an_option_that_is_not_built_is_refused_by_name():
    with pytest.raises(NotBuilt, match="vddk_concurrency"):
        ExportOptions(vm_name="web", output_dir="/data", vddk_concurrency=3)


def test_the_mode_of_cbt_writes_raw_unless_told_otherwise():
    options = ExportOptions(vm_name="web", output_dir="/data", export_mode="cbt_sync", enable_cbt=True)
    assert options.job() == SyncJob(vm_name="web", output_dir="/data", enable_cbt=True, format="raw")
    with pytest.raises(ValidationError):
        options.model_copy(update={"format": "vmdk"}).job()


def test_each_mode_gets_its_own_options():
    options = ExportOptions(
        vm_name="web",
        output_dir="/data",
        export_mode="download_only",
        include_glob=["*.vmx"],
        download_only_concurrency=5,
        snapshot=True,
        format="raw",
    )
    job = options.job()
    assert isinstance(job, DownloadJob)
    assert (job.vm_name, job.include_glob, job.concurrency, job.snapshot) == ("web", ("*.vmx",), 5, True)


def test_the_mode_of_vddk_gets_a_disk_to_choose_and_writes_raw():
    options = ExportOptions(vm_name="web", output_dir="/data", export_mode="vddk_download", disk="2000", format="qcow2")
    job = options.job()
    assert isinstance(job, VddkJob)
    assert (job.disk, job.all_disks, job.image_format, job.arrival_format) == ("2000", False, "raw", "raw")
    with pytest.raises(ValidationError, match="exclude each other"):
        VddkJob(vm_name="web", output_dir="/data", disk="2000", all_disks=True)


def test_a_warm_migration_keeps_to_its_hands_unless_told_in_words():
    options = ExportOptions(vm_name="web", output_dir="/data", export_mode="warm_migration", downtime_budget=90)
    job = options.job()
    assert isinstance(job, WarmJob)
    assert (job.downtime_budget.total_seconds(), job.cutover, job.format, job.delivered_format) == (
        90,
        "none",
        "raw",
        "qcow2",
    )
    assert not (job.shut_down_source or job.power_off_source or job.rename_source or job.disconnect_source)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"cutover": "auto"}, "nothing says that it may"),
        ({"cutover": "at", "shut_down_source": True}, "needs one"),
        ({"cutover": "auto", "shut_down_source": True, "cutover_at": "2026-05-01T02:00:00Z"}, "no other cutover"),
        ({"cutover": "at", "shut_down_source": True, "cutover_at": "2026-05-01T02:00:00"}, "timezone"),
        ({"cutover": "at", "shut_down_source": True, "cutover_at": "tomorrow"}, "datetime"),
        ({"downtime_budget": 0}, "greater than 0"),
        ({"convert_to": "vhdx"}, "match pattern"),
        ({"snapshot_moref": "snapshot-7"}, "no place"),
    ],
)
def test_a_cutover_that_is_not_said_clearly_is_refused(wrong, why):
    with pytest.raises(ValidationError, match=why):
        WarmJob(vm_name="web", output_dir="/data", **wrong)


@pytest.mark.parametrize("mode", [ExportJob, DownloadJob, VddkJob, SyncJob, WarmJob, RollbackJob])
def test_every_field_of_the_form_has_a_title_a_description_and_an_example(mode):
    for name, schema in mode.model_json_schema()["properties"].items():
        described = {"title", "description", "examples"} <= set(schema)
        assert described, f"{name}: {schema}"
        assert schema["title"] != name


@pytest.mark.parametrize(
    "wrong",
    [
        {"vm_name": ""},
        {"format": "vpc"},
        {"format": "raw", "compression": "zstd"},
        {"limit_rate": "fast"},
        {"limit_rate": "1KiB"},
        {"parallel_disks": 0},
        {"parallel_disks": 99},
        {"colour": "red"},
    ],
)
def test_a_wrong_option_is_refused(wrong):
    with pytest.raises(ValidationError):
        ExportJob(**{"vm_name": "web", "output_dir": "/data"} | wrong)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("", None), ("60MiB", 60 * 1024 * 1024), ("60 MiB/s", 60 * 1024 * 1024), ("1GB", 10**9), ("500K", 500_000)],
)
def test_a_rate_is_written_as_people_write_sizes(text, bytes_per_s):
    assert ExportJob(vm_name="x", output_dir="/tmp", limit_rate=text).bytes_per_s == bytes_per_s


# ── the domain ───────────────────────────────────────────────────────────────────────────────────────


def test_networks_are_mapped_at_the_last_colon():
    job = ExportJob(vm_name="web", output_dir="/data", network_map=("VM Network:lan", "a:b: br0 ", "a/b:c"))
    assert job.networks == {"VM Network": "lan", "a:b": "br0", "a/b": "c"}


@pytest.mark.parametrize("entry", ["VM Network", ":lan", "VM Network:", "VM Network: ", "a:b/c", "a:b\nc"])
def test_what_maps_no_network_is_refused_and_shown(entry):
    with pytest.raises(ValidationError, match="is not a network of vSphere, a colon, and a network of libvirt"):
        ExportJob(vm_name="web", output_dir="/data", network_map=(entry,))


def test_what_libvirt_cannot_start_is_not_defined():
    with pytest.raises(ValidationError, match="libvirt has no vhdx disks"):
        ExportJob(vm_name="web", output_dir="/data", format="vhdx", define=True)


@pytest.mark.parametrize("folder", ["/data/\x07", "/data/\ufffe", "/data/\udcff"])
def test_a_folder_that_xml_cannot_name_is_refused(folder):
    with pytest.raises(ValidationError, match="choose a folder without such characters"):
        ExportJob(vm_name="web", output_dir=folder)
