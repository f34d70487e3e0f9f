// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"strings"
)

// Identity is the name of a node as its certificate states it, in the URI
// spiffe://scattergather.io/node/<name>.
type Identity string

// MaxIdentity bounds the name of a node in bytes: a Kubernetes node name is a DNS
// subdomain.
const MaxIdentity = 253

const (
	trustDomain = "scattergather.io"
	nodePath    = "/node/"
)

// check reports whether the name is a DNS subdomain in lower case, so that an identity
// has one spelling, and can be logged and put into a URI as it is.
func (id Identity) check() error {
	if id == "" || len(id) > MaxIdentity {
		return fmt.Errorf("node name of %d bytes, want 1 to %d", len(id), MaxIdentity)
	}
	for i := 0; i < len(id); i++ {
		c := id[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' {
			return fmt.Errorf("node name %.80q: byte %q is not of [a-z0-9.-]", string(id), c)
		}
	}
	return nil
}

// uri returns the identity as a certificate carries it.
func (id Identity) uri() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: nodePath + string(id)}
}

// identityOf returns the node that a certificate names. As SPIFFE wants it, the
// certificate must carry exactly one URI.
func identityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return "", fmt.Errorf("certificate %q carries %d URIs, want exactly spiffe://%s%s<name>",
			cert.Subject, len(cert.URIs), trustDomain, nodePath)
	}
	u := cert.URIs[0]
	name, ok := strings.CutPrefix(u.Path, nodePath)
	id := Identity(name)
	if !ok || *u != *id.uri() {
		return "", fmt.Errorf("certificate %q is for %.300q, want spiffe://%s%s<name>",
			cert.Subject, u, trustDomain, nodePath)
	}
	if err := id.check(); err != nil {
		return "", fmt.Errorf("certificate %q: %w", cert.Subject, err)
	}
	return id, nil
}
