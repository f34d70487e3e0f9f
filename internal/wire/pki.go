// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/tls"
	"crypto/x509"
	"time"
)

// Credentials are what one side proves itself with, and whom it trusts.
type Credentials struct {
	// Certificate is the node's chain and private key.
	Certificate tls.Certificate
	// Roots are the authorities whose node certificates are accepted.
	Roots *x509.CertPool
}

// CredentialsFunc returns the credentials to use now. It is called at every
// handshake, concurrently.
type CredentialsFunc func() (*Credentials, error)

// LoadCredentials reads PEM files: certificate chain, private key, and authorities.
func LoadCredentials(certFile, keyFile, caFile string) (*Credentials, error) {
	return nil, errSkeleton
}

// FileCredentials returns a function that reads the files of LoadCredentials again
// when one of them was changed. While the new ones do not load, it goes on with the
// old ones.
func FileCredentials(certFile, keyFile, caFile string) (CredentialsFunc, error) {
	return nil, errSkeleton
}

// Static returns a function that always returns c.
func (c *Credentials) Static() CredentialsFunc {
	return func() (*Credentials, error) { return c, nil }
}

// Identity returns the node that the certificate names.
func (c *Credentials) Identity() (Identity, error) { return "", errSkeleton }

// CA issues node certificates. It serves tests, the lab and clusters without another
// issuer.
type CA struct{}

// NewCA makes a certificate authority with a new ECDSA P-256 key.
func NewCA(name string, ttl time.Duration) (*CA, error) { return nil, errSkeleton }

// LoadCA reads what WriteFiles wrote.
func LoadCA(certFile, keyFile string) (*CA, error) { return nil, errSkeleton }

// Issue makes the credentials of a node. The certificate is valid from now, less five
// minutes for clocks that differ, for ttl.
func (ca *CA) Issue(node Identity, ttl time.Duration) (*Credentials, error) {
	return nil, errSkeleton
}

// WriteFiles writes the authority's certificate, and its private key with mode 0600.
func (ca *CA) WriteFiles(certFile, keyFile string) error { return errSkeleton }

// WriteFiles writes the node's certificate chain, and its private key with mode 0600.
func (c *Credentials) WriteFiles(certFile, keyFile string) error { return errSkeleton }
