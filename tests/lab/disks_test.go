package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// testDisk is a disk on a datastore of its own, and the same content in memory.
type testDisk struct {
	*disk
	t     *testing.T
	model []byte
}

func newTestDisk(t *testing.T, size int64, keepFrozen bool) *testDisk {
	t.Helper()
	dir := t.TempDir()
	state, err := openState(dir)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{scenario: &scenario{KeepFrozen: keepFrozen}, state: state, scratch: t.TempDir()}
	data := byteSize(size / 3)
	d := &disk{
		lab: l, ds: &datastore{name: "ds", dir: dir}, base: "x", capacity: size, key: 2000, uuid: diskUUID(),
		moments: map[string]*moment{}, spec: diskSpec{Backing: backingFlat, Data: &data, Mode: "persistent"},
	}
	if err := d.createBase(t.Name()); err != nil {
		t.Fatal(err)
	}
	td := &testDisk{disk: d, t: t, model: make([]byte, size)}
	if err := d.readLayer(0, td.model, 0); err != nil {
		t.Fatal(err)
	}
	return td
}

func (d *testDisk) write(r *rand.Rand) {
	d.t.Helper()
	n := r.Int64N(100_000) + 1
	off := r.Int64N(d.capacity - n)
	p := randomBytes(r.Uint64(), n)
	copy(d.model[off:], p)
	if err := d.guestWrite(off, p); err != nil {
		d.t.Fatal(err)
	}
}

func (d *testDisk) wantDigest(snapshot, want string) {
	d.t.Helper()
	got, err := d.sha256(snapshot)
	if err != nil || got != want {
		d.t.Fatalf("digest of %q: %s, %v; want %s", snapshot, got, err, want)
	}
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// qemuReads is the digest of what qemu-img makes of an image.
func qemuReads(t *testing.T, file string) string {
	t.Helper()
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("no qemu-img")
	}
	raw := filepath.Join(t.TempDir(), "raw")
	if out, err := exec.Command(tool, "convert", "-U", "-O", "raw", file, raw).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return digest(b)
}

func TestSnapshotsKeepTheirContentInAnyOrderOfRemoval(t *testing.T) {
	for seed := uint64(1); seed <= 5; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			d := newTestDisk(t, 3<<20, false)
			want, open := map[string]string{}, []string{}
			for i := range 12 {
				for range 4 {
					d.write(r)
				}
				if len(open) > 0 && r.IntN(2) == 0 {
					k := r.IntN(len(open))
					if err := d.release(open[k], r.IntN(4) > 0); err != nil {
						t.Fatal(err)
					}
					open = append(open[:k], open[k+1:]...)
				} else {
					name := fmt.Sprint("s", i)
					want[name], open = digest(d.model), append(open, name)
					if err := d.freeze(name, false, false); err != nil {
						t.Fatal(err)
					}
				}
				d.wantDigest("", digest(d.model))
			}
			for name, sum := range want {
				d.wantDigest(name, sum)
			}
			if err := d.consolidateAll(); err != nil {
				t.Fatal(err)
			}
			for name, sum := range want {
				d.wantDigest(name, sum)
			}
			if got := qemuReads(t, d.path(d.top().descriptor)); got != digest(d.model) {
				t.Fatal("qemu-img reads the chain differently")
			}
		})
	}
}

func TestQemuReadsChainsAndFrozenCopies(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	d := newTestDisk(t, 5<<20+1536, true)
	before := digest(d.model)
	if err := d.freeze("plain", false, false); err != nil {
		t.Fatal(err)
	}
	for range 30 {
		d.write(r)
	}
	if got := qemuReads(t, d.path(d.top().descriptor)); got != digest(d.model) {
		t.Error("the live chain is read differently")
	}
	if got, err := d.sha256Range("", 70001, 1_500_000); err != nil || got != digest(d.model[70001:1_570_001]) {
		t.Error("the digest of a part is another", err)
	}
	if got := qemuReads(t, filepath.Join(d.lab.state.path, frozenDir, "plain", "x.vmdk")); got != before {
		t.Error("the frozen copy is read differently")
	}
}

func TestVSSSnapshotHasARedoLogOfItsOwn(t *testing.T) {
	d := newTestDisk(t, 2<<20, false)
	if err := d.freeze("q", true, false); err != nil {
		t.Fatal(err)
	}
	side := d.moments["q"].side
	sum, err := d.sha256("q")
	if err != nil || sum == digest(d.model) {
		t.Fatal("the snapshot's redo log changes nothing")
	}
	if got := qemuReads(t, d.path(side.descriptor)); got != sum {
		t.Error("qemu-img reads the snapshot's redo log differently")
	}
	if err := d.release("q", true); err != nil {
		t.Fatal(err)
	}
	d.moments["q"].digest = "" // not from memory
	d.wantDigest("q", sum)
	if _, err := os.Stat(d.path(side.extentName)); err == nil {
		t.Error("the snapshot's redo log is still there")
	}
}

func TestSeSparseIsReadByQemu(t *testing.T) {
	const size = 40<<20 + 512
	file := filepath.Join(t.TempDir(), "x-sesparse.vmdk")
	x, err := createSeSparse(file, size)
	if err != nil {
		t.Fatal(err)
	}
	model, r := make([]byte, size), rand.New(rand.NewPCG(3, 3))
	for range 5000 {
		off := r.Int64N(size/seGrain+1) * seGrain
		p := randomBytes(r.Uint64(), min(seGrain, size-off))
		copy(model[off:], p)
		if err = x.writeAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, size)
	zeros := func(p []byte, _ int64) error { clear(p); return nil }
	if err = x.readOver(got, 0, zeros); err != nil || !bytes.Equal(got, model) {
		t.Fatal("reads back differently", err)
	}
	descriptor := filepath.Join(filepath.Dir(file), "x.vmdk")
	text := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n"+
		"createType=\"seSparse\"\nRW %d SESPARSE \"x-sesparse.vmdk\"\n", size/sectorSize)
	if err = os.WriteFile(descriptor, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if qemuReads(t, descriptor) != digest(model) {
		t.Error("qemu-img reads it differently")
	}
}

func TestBootSectorIsWhole(t *testing.T) {
	s := bootSector()
	if len(s) != sectorSize || s[510] != 0x55 || s[511] != 0xAA || !bytes.Contains(s, []byte(bootMessage)) {
		t.Fatal("not a boot sector with the message")
	}
	message := int(s[13]) | int(s[14])<<8
	if message-0x7c00 != len(bootCode) {
		t.Errorf("the code looks for its message at %#x, it is at %#x", message, 0x7c00+len(bootCode))
	}
}
