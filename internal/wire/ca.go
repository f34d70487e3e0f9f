// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"time"
)

// skew is how far clocks of nodes may differ.
const skew = 5 * time.Minute

// CA issues node certificates. It serves tests, the lab and clusters without another
// issuer.
type CA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewCA makes a certificate authority with a new ECDSA P-256 key, valid for ttl.
func NewCA(name string, ttl time.Duration) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the key of authority %q: %w", name, err)
	}
	template := newTemplate(name, ttl)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making authority %q: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("making authority %q: %w", name, err)
	}
	return &CA{cert: cert, key: key}, nil
}

// LoadCA reads what WriteFiles wrote.
func LoadCA(certFile, keyFile string) (*CA, error) {
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("loading the authority %s with key %s: %w", certFile, keyFile, err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("loading the authority %s: it cannot sign certificates", certFile)
	}
	return &CA{cert: pair.Leaf, key: key}, nil
}

// Issue makes the credentials of a node, valid for ttl from now, and for five minutes
// before, because clocks differ.
func (ca *CA) Issue(node Identity, ttl time.Duration) (*Credentials, error) {
	if err := node.check(); err != nil {
		return nil, fmt.Errorf("issuing a node certificate: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the key of node %s: %w", node, err)
	}
	template := newTemplate(commonName(node), ttl)
	template.URIs = []*url.URL{node.uri()}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, fmt.Errorf("issuing the certificate of node %s: %w", node, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("issuing the certificate of node %s: %w", node, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return &Credentials{Certificate: pair, Roots: roots}, nil
}

// WriteFiles writes the authority's certificate, and its private key with mode 0600.
func (ca *CA) WriteFiles(certFile, keyFile string) error {
	return writePair(certFile, keyFile, [][]byte{ca.cert.Raw}, ca.key)
}

// commonName is what logs show of a certificate; X.509 allows it 64 characters. The
// identity is in the URI.
func commonName(node Identity) string {
	if len(node) > 64 {
		return string(node[:64])
	}
	return string(node)
}

func newTemplate(name string, ttl time.Duration) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		// A random number of 127 bits or less needs no state to be unique.
		SerialNumber: new(big.Int).SetBytes(serial()),
		Subject:      pkix.Name{Organization: []string{"scattergather.io"}, CommonName: name},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(ttl),
	}
}

func serial() []byte {
	b := make([]byte, 16)
	rand.Read(b) // never fails: it crashes the process instead
	b[0] &= 0x7f
	return b
}
