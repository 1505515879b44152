// A fresh CA and server certificate for each lab, as vCenter's own VMCA signs its machine certificate.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

type certificates struct {
	leaf         tls.Certificate
	caPEM        string
	sha1, sha256 string // of the leaf, as AA:BB:…
}

func serialNumber() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return n
}

// newCertificates makes a certificate good for host, 127.0.0.1, ::1 and localhost.
func newCertificates(host string) (*certificates, error) {
	from := time.Now().Add(-time.Hour)
	ca := &x509.Certificate{
		SerialNumber: serialNumber(), NotBefore: from, NotAfter: from.AddDate(1, 0, 0),
		Subject: pkix.Name{CommonName: "hyper2kvm lab CA", Organization: []string{"hyper2kvm"}},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	caKey, caDER, err := issue(ca, nil, nil)
	if err != nil {
		return nil, err
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{
		SerialNumber: serialNumber(), NotBefore: from, NotAfter: from.AddDate(1, 0, 0),
		Subject:     pkix.Name{CommonName: "localhost", Organization: []string{"hyper2kvm"}},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if ip := net.ParseIP(host); ip != nil {
		leaf.IPAddresses = append(leaf.IPAddresses, ip)
	} else if host != "" {
		leaf.DNSNames = append(leaf.DNSNames, host)
	}
	key, der, err := issue(leaf, ca, caKey)
	if err != nil {
		return nil, err
	}
	one, two := sha1.Sum(der), sha256.Sum256(der)
	return &certificates{
		leaf:  tls.Certificate{Certificate: [][]byte{der, caDER}, PrivateKey: key},
		caPEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})),
		sha1:  colons(one[:]), sha256: colons(two[:]),
	}, nil
}

// issue makes a key and a certificate for it, signed by parent, or by itself where that is nil.
func issue(template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	return key, der, err
}

func colons(b []byte) string {
	return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":")
}
