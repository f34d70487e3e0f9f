// SPDX-License-Identifier: Apache-2.0

// Package guest is what the lab and the guest it boots have in common: the
// content of a page as a function of its number and generation, the parameters
// on the kernel's command line, and the telemetry frames that cross the guest's
// second serial port.
//
// The guest itself is cmd/labguest, a static program that runs as init.
package guest
