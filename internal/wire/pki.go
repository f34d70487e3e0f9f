// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"sync"
	"time"
)

// Credentials are what one side proves itself with, and whom it trusts.
type Credentials struct {
	// Certificate is the node's chain and private key.
	Certificate tls.Certificate
	// Roots are the authorities whose node certificates are accepted.
	Roots *x509.CertPool
}

// CredentialsFunc returns the credentials to use now. It is called at every handshake,
// concurrently.
type CredentialsFunc func() (*Credentials, error)

// LoadCredentials reads PEM files: certificate chain, private key, and authorities.
func LoadCredentials(certFile, keyFile, caFile string) (*Credentials, error) {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("loading the node certificate %s with key %s: %w", certFile, keyFile, err)
	}
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("loading the trusted authorities: %w", err)
	}
	c := &Credentials{Certificate: cert, Roots: x509.NewCertPool()}
	if !c.Roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("loading the trusted authorities: %s holds no PEM certificate", caFile)
	}
	if _, err = c.Identity(); err != nil {
		return nil, fmt.Errorf("loading the node certificate %s: %w", certFile, err)
	}
	return c, nil
}

// Static returns a function that always returns c.
func (c *Credentials) Static() CredentialsFunc {
	return func() (*Credentials, error) { return c, nil }
}

// Identity returns the node that the certificate names.
func (c *Credentials) Identity() (Identity, error) {
	leaf, err := c.leaf()
	if err != nil {
		return "", err
	}
	return identityOf(leaf)
}

func (c *Credentials) leaf() (*x509.Certificate, error) {
	if c.Certificate.Leaf != nil {
		return c.Certificate.Leaf, nil
	}
	if len(c.Certificate.Certificate) == 0 {
		return nil, fmt.Errorf("credentials without a certificate")
	}
	return x509.ParseCertificate(c.Certificate.Certificate[0])
}

// WriteFiles writes the node's certificate chain, and its private key with mode 0600.
func (c *Credentials) WriteFiles(certFile, keyFile string) error {
	return writePair(certFile, keyFile, c.Certificate.Certificate, c.Certificate.PrivateKey)
}

// writePair writes a chain and its key as PEM. The key is written first, so that a new
// certificate is never seen with an old key for longer than one call takes.
func writePair(certFile, keyFile string, chain [][]byte, key any) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding the key for %s: %w", keyFile, err)
	}
	if err := replaceFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	var text []byte
	for _, cert := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...)
	}
	return replaceFile(certFile, text, 0o644)
}

// replaceFile writes a file beside the old one and renames it, so that no reader sees
// half of it, and an old file's mode does not stay.
func replaceFile(name string, data []byte, mode os.FileMode) error {
	temporary := name + ".new"
	if err := os.Remove(temporary); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.WriteFile(temporary, data, mode); err != nil {
		return err
	}
	return os.Rename(temporary, name)
}

// recheck is how often the files of FileCredentials are looked at.
const recheck = time.Second

// FileCredentials returns a function that reads the files of LoadCredentials again when
// one of them was changed. While the new ones do not load, it goes on with the old
// ones: a certificate may be seen before its key. It fails if they do not load now.
func FileCredentials(certFile, keyFile, caFile string) (CredentialsFunc, error) {
	f := &credentialFiles{names: [3]string{certFile, keyFile, caFile}}
	f.stamps = f.stat()
	f.checked = time.Now()
	var err error
	if f.current, err = LoadCredentials(certFile, keyFile, caFile); err != nil {
		return nil, err
	}
	return f.get, nil
}

// fileStamp tells one content of a file from the next.
type fileStamp struct {
	modified time.Time
	size     int64
}

type credentialFiles struct {
	names [3]string

	mu      sync.Mutex
	current *Credentials
	stamps  [3]fileStamp // of current
	checked time.Time
}

func (f *credentialFiles) stat() (stamps [3]fileStamp) {
	for i, name := range f.names {
		if info, err := os.Stat(name); err == nil {
			stamps[i] = fileStamp{info.ModTime(), info.Size()}
		}
	}
	return stamps
}

func (f *credentialFiles) get() (*Credentials, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.checked) < recheck {
		return f.current, nil
	}
	f.checked = time.Now()
	// Stamps are taken before reading: a change in between is seen next time.
	stamps := f.stat()
	if stamps == f.stamps {
		return f.current, nil
	}
	c, err := LoadCredentials(f.names[0], f.names[1], f.names[2])
	if err != nil {
		if leaf, _ := f.current.leaf(); leaf != nil && time.Now().After(leaf.NotAfter) {
			return nil, fmt.Errorf("the node certificate has expired, and the new one does not load: %w", err)
		}
		return f.current, nil
	}
	f.current, f.stamps = c, stamps
	return f.current, nil
}
