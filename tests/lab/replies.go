// Replies as vCenter sends them: xsi:type on the members of ArrayOf… values.
//
// The simulator leaves it out; libvirt's driver then says "AnyType is missing 'type' property". The scanner below
// relies on what Go's encoder writes: no comments, no CDATA, no `>` inside attributes.
package main

import (
	"bytes"
	"regexp"
)

// xsdMembers are the members that are plain XML Schema types; any other is named as its type.
var xsdMembers = map[string]string{
	"string": "xsd:string", "int": "xsd:int", "short": "xsd:short", "long": "xsd:long", "byte": "xsd:byte",
	"boolean": "xsd:boolean", "double": "xsd:double", "float": "xsd:float", "dateTime": "xsd:dateTime",
	"anyURI": "xsd:anyURI", "base64Binary": "xsd:base64Binary",
}

var (
	typeAttr    = []byte(`type="ArrayOf`)
	xsiType     = regexp.MustCompile(`\s[\w.-]+:type="`)
	emptyMember = regexp.MustCompile(`<propSet><name>[^<]*</name></propSet>`)
)

var (
	fetchRequest = regexp.MustCompile(`<(?:\w+:)?Fetch[\s>]`)
	wrongReply   = regexp.MustCompile(`(?s)<RetrievePropertiesExResponse.*</RetrievePropertiesExResponse>`)
)

// fetchReply puts right what the simulator answers to a Fetch of a property without a value: the reply to another
// call, on which pyvmomi raises AttributeError.
func fetchReply(request, reply []byte) []byte {
	if !fetchRequest.Match(request[:min(len(request), 2048)]) {
		return reply
	}
	return wrongReply.ReplaceAll(reply, []byte(`<FetchResponse xmlns="urn:vim25"></FetchResponse>`))
}

// typeArrayMembers adds the types, and leaves out properties without a value, which vCenter does not send.
func typeArrayMembers(body []byte) []byte {
	if !bytes.Contains(body, typeAttr) && !bytes.Contains(body, []byte("</name></propSet>")) {
		return body
	}
	body = emptyMember.ReplaceAll(body, nil)
	out := make([]byte, 0, len(body)+len(body)/8)
	var inArray []bool // for each open element: is it an ArrayOf… value
	for len(body) > 0 {
		lt := bytes.IndexByte(body, '<')
		if lt < 0 {
			break
		}
		end := bytes.IndexByte(body[lt:], '>')
		if end < 0 {
			break
		}
		tag := body[lt : lt+end+1]
		out = append(out, body[:lt]...)
		body = body[lt+end+1:]
		switch {
		case tag[1] == '?':
			out = append(out, tag...)
		case tag[1] == '/':
			out = append(out, tag...)
			if len(inArray) > 0 {
				inArray = inArray[:len(inArray)-1]
			}
		default:
			member := len(inArray) > 0 && inArray[len(inArray)-1]
			out = appendTyped(out, tag, member)
			if tag[len(tag)-2] != '/' {
				inArray = append(inArray, bytes.Contains(tag, typeAttr))
			}
		}
	}
	return append(out, body...)
}

// appendTyped appends a start tag, with its type where it is a member that has none.
func appendTyped(out, tag []byte, member bool) []byte {
	if !member || xsiType.Match(tag) {
		return append(out, tag...)
	}
	n := bytes.IndexAny(tag, " />")
	name := string(tag[1:n])
	kind, plain := xsdMembers[name]
	if !plain {
		kind = name
	}
	out = append(out, tag[:n]...)
	out = append(out, ` xsi:type="`...)
	out = append(out, kind...)
	out = append(out, '"')
	return append(out, tag[n:]...)
}
