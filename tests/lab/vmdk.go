// Descriptor files (Virtual Disk Format 5.0 and 1.1): the text beside each extent.
package main

import (
	"fmt"
	"os"
	"strings"
)

// writeDescriptor writes the descriptor of layer i as the chain now is.
func (d *disk) writeDescriptor(i int) error {
	if i > 0 {
		return d.writeDeltaDescriptor(d.layers[i], d.layers[i-1])
	}
	l := d.layers[0]
	var b strings.Builder
	if d.spec.Backing == backingSeSparse {
		descriptorHead(&b, l.cid, 0xffffffff, "seSparse")
		fmt.Fprintf(&b, "\n# Extent description\nRW %d SESPARSE \"%s\"\n", d.capacity/sectorSize, l.extentName)
	} else {
		descriptorHead(&b, l.cid, 0xffffffff, "monolithicFlat")
		fmt.Fprintf(&b, "\n# Extent description\nRW %d FLAT \"%s\" 0\n", d.capacity/sectorSize, l.extentName)
	}
	b.WriteString("\n# The Disk Data Base\n#DDB\n\n")
	cylinders := min(d.capacity/sectorSize/255/63, 65535)
	fmt.Fprintf(&b, "ddb.adapterType = \"%s\"\n", d.spec.adapterType())
	fmt.Fprintf(&b, "ddb.geometry.cylinders = \"%d\"\nddb.geometry.heads = \"255\"\n", cylinders)
	b.WriteString("ddb.geometry.sectors = \"63\"\nddb.virtualHWVersion = \"19\"\n")
	fmt.Fprintf(&b, "ddb.uuid = \"%s\"\n", ddbUUID(d.uuid))
	if d.spec.Thin {
		b.WriteString("ddb.thinProvisioned = \"1\"\n")
	}
	return d.writeText(&b, l)
}

// writeDeltaDescriptor writes the descriptor of a delta above parent.
func (d *disk) writeDeltaDescriptor(l, parent *layer) error {
	kind := "vmfsSparse"
	if _, se := l.store.(*seSparseFile); se {
		kind = "seSparse"
	}
	var b strings.Builder
	descriptorHead(&b, l.cid, parent.cid, kind)
	fmt.Fprintf(&b, "parentFileNameHint=\"%s\"\n", parent.descriptor)
	fmt.Fprintf(&b, "\n# Extent description\nRW %d %s \"%s\"\n",
		d.capacity/sectorSize, strings.ToUpper(kind), l.extentName)
	b.WriteString("\n# The Disk Data Base\n#DDB\n\n")
	return d.writeText(&b, l)
}

func descriptorHead(b *strings.Builder, cid, parent uint32, kind string) {
	fmt.Fprintf(b, "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=%08x\n", cid)
	fmt.Fprintf(b, "parentCID=%08x\nisNativeSnapshot=\"no\"\ncreateType=\"%s\"\n", parent, kind)
}

// writeText puts the descriptor in place at once, whole.
func (d *disk) writeText(b *strings.Builder, l *layer) error {
	fmt.Fprintf(b, "ddb.longContentID = \"%024x%08x\"\n", d.key, l.cid)
	tmp := d.path(l.descriptor) + "~"
	if err := os.WriteFile(tmp, []byte(b.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, d.path(l.descriptor))
}

// ddbUUID spells 6000C29x-aabb-… as "60 00 C2 9x aa bb cc dd-ee ff …", as the disk database has it.
func ddbUUID(uuid string) string {
	hex := strings.ReplaceAll(uuid, "-", "")
	var b strings.Builder
	for i := 0; i+2 <= len(hex); i += 2 {
		switch i {
		case 0:
		case 16:
			b.WriteByte('-')
		default:
			b.WriteByte(' ')
		}
		b.WriteString(strings.ToLower(hex[i : i+2]))
	}
	return b.String()
}
