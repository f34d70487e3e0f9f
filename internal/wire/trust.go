// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// alpn keeps a TLS session of this protocol from being taken for one of another.
const alpn = "scattergather"

// tlsConfig returns what both sides share. Go's own checks match host names, of which
// node certificates have none; VerifyConnection checks in their place, on every
// handshake, because sessions are never resumed.
func tlsConfig(c *Credentials, usage x509.ExtKeyUsage, accept func(Identity) error) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{c.Certificate},
		NextProtos:             []string{alpn},
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true,
		// Control frames are as large as they are; small first records do not pay.
		DynamicRecordSizingDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if s.NegotiatedProtocol != alpn {
				return fmt.Errorf("%w: it does not speak %q", ErrPeer, alpn)
			}
			id, err := verify(s.PeerCertificates, c.Roots, usage)
			if err != nil {
				return err
			}
			return accept(id)
		},
	}
}

// verify checks a peer's chain and returns the node that it names.
func verify(chain []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage) (Identity, error) {
	if len(chain) == 0 {
		return "", fmt.Errorf("%w: no certificate", ErrPeer)
	}
	leaf := chain[0]
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "", fmt.Errorf("%w: the certificate of %q is valid from %s to %s, now is %s", ErrPeer, leaf.Subject,
			leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339))
	case errors.As(err, &unknown):
		return "", fmt.Errorf("%w: the certificate of %q is signed by %q, which is not among the trusted authorities",
			ErrPeer, leaf.Subject, leaf.Issuer)
	case err != nil:
		return "", fmt.Errorf("%w: the certificate of %q: %w", ErrPeer, leaf.Subject, err)
	}
	id, err := identityOf(leaf)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrPeer, err)
	}
	return id, nil
}
